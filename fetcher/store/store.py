"""The store of a node: the only code that writes below the root, mounts and records aside."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fetcher.artifacts import FileEntry, HardLinkEntry, Tree
from fetcher.chunk_sizes import chunk_size_for
from fetcher.errors import InProgress, ModelError
from fetcher.modelpack import Packing
from fetcher.store.blobs import PartialBlob
from fetcher.store.catalog import Catalog
from fetcher.store.chunks import trust_only
from fetcher.store.damages import Damages
from fetcher.store.database import Database
from fetcher.store.disk import disk_error
from fetcher.store.footprint import BLOBS, MODELS, TRASH, content_name, tree_name
from fetcher.store.garbage import Garbage
from fetcher.store.holdings import Holdings
from fetcher.store.integrity import Wanted, blob_problem, heal_tree, layer_problem
from fetcher.store.layers import FRAME, INDEX, load_layer, unpack_layer
from fetcher.store.lists import ListRecords
from fetcher.store.orphans import Orphans
from fetcher.store.places import TarFiles, WholeFile
from fetcher.store.rooms import TREE_BYTES, Need, Room, Rooms, need_of, need_of_part
from fetcher.store.space import Limits, Space
from fetcher.store.stored import StoredBlob
from fetcher.store.trees import ModelTree, build_tree, measure_tree

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from fetcher.archives import UnpackLimits
    from fetcher.modelpack import Layer, Model, Selection
    from fetcher.oci import Descriptor, Digest
    from fetcher.store.places import Place

NO_CAP: Final = Limits()
"""As much as the disk has, but for a floor."""


class Store:
    """Blobs, unpacked layers, trees and their records below one root.

    Made by :meth:`open`. Methods that say so run in a worker thread; all others belong to the trio
    thread, and are short.
    """

    def __init__(
        self, root: Path, lock: int, database: Database, chunk_size: int, limits: Limits
    ) -> None:
        self.root = root
        self.database = database
        self.catalog = Catalog(database)
        self.damages = Damages(database)
        self.lists = ListRecords(database)
        self.space = Space(root, Holdings(database), limits)
        self.garbage = Garbage(database, self.catalog, self.space)
        self.rooms = Rooms(self.space, self.garbage)
        self.orphans = Orphans(self.catalog, self.space, self.garbage, self.rooms)
        self._lock = lock
        self._chunk_size = chunk_size

    @classmethod
    def open(cls, root: Path, chunk_size: int = 4 * 1024 * 1024, limits: Limits = NO_CAP) -> Store:
        """Open the store at ``root``, made if it is not there. One process at a time.

        Its cost does not grow with what the store holds. Raises :class:`InProgress` when another
        process has it open, naming that process, and :class:`ModelError` when it cannot be used.
        """
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in (BLOBS, MODELS, TRASH):
                (root / name).mkdir(mode=0o700, exist_ok=True)
            lock = _lock(root / "lock")
        except OSError as error:
            raise disk_error(error, root) from error
        try:
            return cls(root, lock, Database(root / "state.db"), chunk_size, limits)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Close it and let the next process in."""
        self.database.close()
        os.close(self._lock)

    @property
    def models_folder(self) -> Path:
        """Where all trees lie: the source of every bind mount of an eager volume."""
        return self.root / "models"

    # -- blobs -------------------------------------------------------------------------------------

    def blob_path(self, digest: Digest) -> Path:
        """Where the bytes of a blob lie."""
        # at one go: each part more would be joined by itself, and this is asked for all the time
        return self.root / f"blobs/{digest.algorithm}/{digest.hex}"

    def _chunks_path(self, digest: Digest) -> Path:
        return self.blob_path(digest).with_name(digest.hex + ".chunks")

    def _parts_path(self, digest: Digest) -> Path:
        return self.blob_path(digest).with_name(digest.hex + ".parts")

    def _files_path(self, digest: Digest) -> Path:
        return self.blob_path(digest).with_name(digest.hex + ".files")

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether the blob is complete: verified, synchronised, and its file still there."""
        if not self.catalog.has_blob(blob.digest, blob.size):
            return False
        try:
            there = self.blob_path(blob.digest).stat().st_size == blob.size
        except FileNotFoundError:
            there = False
        if not there:
            self.catalog.remove_blob(blob.digest)
        return there

    def _is_whole_file(self, blob: Descriptor) -> bool:
        """Whether a blob's file lies there and nobody fills it, recorded as complete or not."""
        is_filled = self._chunks_path(blob.digest).exists()
        return self.has_blob(blob) or (not is_filled and self.blob_path(blob.digest).exists())

    def has_bytes(self, layer: Layer) -> bool:
        """Whether the bytes of a layer's blob are all here, verified, in whatever form."""
        if self.has_blob(layer.descriptor):
            return True
        return (self._files_path(layer.descriptor.digest) / FRAME).exists()

    def open_partial(
        self, layer: Layer, name: str = "", chunk_size: int | None = None
    ) -> PartialBlob:
        """Open what is there of an incomplete blob, to fill it, in a worker thread.

        What is trusted of it is what came by ``name``. One that is begun gets chunks of
        ``chunk_size`` bytes, where that takes no more room than usual. Raises :class:`ModelError`.
        """
        blob = layer.descriptor
        path, chunks = self.blob_path(blob.digest), self._chunks_path(blob.digest)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # a complete blob's file without its record may be half written: it is not believed
            if not chunks.exists():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error
        is_tar = layer.packing is Packing.TAR
        grow = self.room(blob.digest).grow
        place: Place = TarFiles(path, grow) if is_tar else WholeFile(path)
        usual = chunk_size_for(layer, self._chunk_size)
        if chunk_size is None or (is_tar and chunk_size > usual):
            chunk_size = usual
        partial = PartialBlob(place, chunks, blob.digest, blob.size, chunk_size)
        try:
            partial.trust(name)
        except BaseException:
            partial.close()
            raise
        return partial

    def trust_only(self, digest: Digest, name: str) -> None:
        """Let readers trust nothing of an incomplete blob that another name than ``name`` sent.

        Nobody fills it at present. Raises :class:`ModelError`.
        """
        path = self._chunks_path(digest)
        try:
            if not trust_only(path, name):
                # of the headers that the other one sent
                (self._parts_path(digest) / INDEX).unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error

    def missing_bytes(self, blob: Descriptor) -> int:
        """Bytes of the blob that take new space on the disk when it is fetched."""
        try:
            taken = self.blob_path(blob.digest).stat().st_blocks * 512
        except FileNotFoundError:
            return blob.size
        return max(blob.size - taken, 0)

    def complete_blob(self, layer: Layer, proven_name: str | None = None) -> None:
        """Record a blob that was verified and finished, and drop its chunk map; and that all of it
        was had below ``proven_name``, if that is given. Both are durable when it returns.
        """
        digest = layer.descriptor.digest
        if layer.packing is Packing.TAR:
            # its files are what there is of it now, and they are their own record
            self.blob_path(digest).unlink(missing_ok=True)
            if proven_name is not None:
                self.catalog.add_proof(proven_name, digest)
        else:
            self.catalog.add_blob(digest, layer.descriptor.size, proven_name)
        self._chunks_path(digest).unlink(missing_ok=True)

    def discard_blob(self, digest: Digest) -> None:
        """Remove a blob whose bytes proved wrong."""
        self.catalog.remove_blob(digest)
        self.blob_path(digest).unlink(missing_ok=True)
        self._chunks_path(digest).unlink(missing_ok=True)
        shutil.rmtree(self._parts_path(digest), ignore_errors=True)

    def stored(self, digest: Digest) -> StoredBlob | None:
        """A complete blob, to be read byte for byte; None if it is not here in that form."""
        path, files = self.blob_path(digest), self._files_path(digest)
        if (files / FRAME).exists():
            return StoredBlob.of_files(files)
        size = self.catalog.blob_size(digest)
        return None if size is None else StoredBlob.of_file(path, size)

    def is_complete(self, digest: Digest) -> bool:
        """Whether a content is said to be complete, in whatever form."""
        return self.catalog.blob_size(digest) is not None or self._files_path(digest).exists()

    def has_files(self, layer: Layer) -> bool:
        """Whether what trees link to is there, by the disk alone: for a worker thread."""
        digest = layer.descriptor.digest
        if layer.packing is Packing.RAW:
            return self.blob_path(digest).exists()
        return self._files_path(digest).exists()

    def content_check(self, digest: Digest) -> Callable[[threading.Event], str | None]:
        """What reads a complete content again, in a worker thread, and says what is wrong with it.

        It gives None if nothing is, and raises :class:`fetcher.threads.Stopped`.
        """
        path, files = self.blob_path(digest), self._files_path(digest)
        is_blob, is_layer = self.catalog.blob_size(digest) is not None, files.exists()

        def check(stop: threading.Event) -> str | None:
            problem = layer_problem(files, digest, stop) if is_layer else None
            if problem is None and (is_blob or not is_layer):
                problem = blob_problem(path, digest, stop)
            return problem

        return check

    # -- space -------------------------------------------------------------------------------------

    def held(self, model: Model, selection: Selection) -> AbstractContextManager[None]:
        """Work on a model: nothing of it is evicted inside the block."""
        contents = map(content_name, selection.layers(model))
        return self.space.held({tree_name(model.digest, selection.key), *contents})

    def held_content(self, digest: Digest) -> AbstractContextManager[None]:
        """Work on one content: it is not evicted inside the block."""
        return self.space.held([content_name(digest)])

    async def reserve(self, what: str, model: Model, selection: Selection) -> None:
        """Reserve room for all of a model that is not here, before a byte of it is fetched.

        The caller holds the model, and the reservation lasts as long. Raises
        :class:`fetcher.errors.NoSpace` with the figures; ``what`` is the model's name in it.
        """
        tree = Need(TREE_BYTES, spare=TREE_BYTES)
        whole = tree.bytes
        needs = {tree_name(model.digest, selection.key): tree}
        for digest, layer in selection.layers(model).items():
            need = need_of(layer, self._chunk_size)
            whole += need.bytes
            if not self.has_content(layer):
                needs[content_name(digest)] = need
        await self.rooms.reserve(what, needs, whole)

    async def begun_bytes(self, layer: Layer) -> int:
        """Bytes that one content takes now, or was promised. Raises :class:`ModelError`."""
        name = content_name(layer.descriptor.digest)
        await self.rooms.settle_only([name])
        return self.space.holdings.get([name]).get(name, 0)

    async def reserve_part(self, what: str, layer: Layer, size: int) -> None:
        """Reserve room for one content, which the caller holds, to have ``size`` bytes of its blob.

        Nothing is evicted for it. Raises :class:`fetcher.errors.NoSpace` with the figures.
        """
        claim = need_of_part(layer, self._chunk_size, size)
        await self.rooms.reserve_left(what, {content_name(layer.descriptor.digest): claim})

    def room(self, digest: Digest) -> Room:
        """Room for a content that takes more than was reserved for it. From any thread."""
        return self.rooms.room(content_name(digest))

    # -- layers and trees --------------------------------------------------------------------------

    def has_content(self, layer: Layer) -> bool:
        """Whether nothing of this layer needs to be fetched."""
        if layer.packing is Packing.RAW:
            return self.has_blob(layer.descriptor)
        there = self._files_path(layer.descriptor.digest).is_dir()
        if there and layer.packing is Packing.TAR and not self.has_blob(layer.descriptor):
            # what a kill left between the last step of its download and the removal of its frame
            self.discard_blob(layer.descriptor.digest)
        elif there and layer.packing is not Packing.TAR and self._is_whole_file(layer.descriptor):
            # or between its unpacking and the removal of what it was unpacked from
            self.laid_out(layer)
        return there

    def lay_out(self, layer: Layer, limits: UnpackLimits, stop: threading.Event) -> None:
        """Make a layer's content of its complete blob, in a worker thread; durable.

        Unpacks what is compressed. Also brings a blob that is here in another form, as two models
        may have one blob as a file and as a tar, into the form that this layer needs. Raises
        :class:`fetcher.errors.InvalidArtifact`, ``NoSpace``, :class:`fetcher.threads.Stopped`.
        """
        digest = layer.descriptor.digest
        if layer.packing is Packing.RAW:
            self.room(digest).grow(need_of(layer, self._chunk_size).bytes)
            StoredBlob.of_files(self._files_path(digest)).copy_to(self.blob_path(digest), stop)
            return
        # entries are checked among themselves here, and with those of the other layers in `plan`
        entries = Tree()
        unpack_layer(
            self.blob_path(digest),
            self._files_path(digest),
            layer.packing,
            limits,
            stop,
            entries.add,
            self.room(digest).grow,
        )

    def laid_out(self, layer: Layer) -> None:
        """Record what :meth:`lay_out` made, and drop what nobody needs beside it.

        The blob of an unpacked layer goes, as its files are what trees link to; but not where some
        tree shows the blob itself, as another model's raw layer.
        """
        digest = layer.descriptor.digest
        if layer.packing is Packing.RAW:
            self.catalog.add_blob(digest, layer.descriptor.size)
            return
        try:
            shown = self.blob_path(digest).stat().st_nlink > 1
        except FileNotFoundError:
            shown = False
        if not shown:
            self.discard_blob(digest)

    def plan(self, model: Model, selection: Selection) -> tuple[Tree, dict[str, Path]]:
        """The tree that ``selection`` leaves of a model whose content is all here, and its sources.

        Reads the indexes of unpacked layers; for a worker thread. Raises
        :class:`fetcher.errors.InvalidArtifact` when layers contradict each other.
        """
        tree = Tree()
        sources: dict[str, Path] = {}
        for layer in model.layers:
            if not selection.wants_layer(layer):
                continue
            if layer.packing is Packing.RAW:
                self._plan_raw(layer, tree, sources)
            else:
                self._plan_unpacked(layer, selection, tree, sources)
        return tree, sources

    def _plan_raw(self, layer: Layer, tree: Tree, sources: dict[str, Path]) -> None:
        if layer.path is None:
            raise ValueError(f"a raw layer without a path: {layer}")
        size = layer.descriptor.size
        tree.add(FileEntry(layer.path, size, layer.executable, layer.mtime_ns))
        sources[layer.path] = self.blob_path(layer.descriptor.digest)

    def _plan_unpacked(
        self, layer: Layer, selection: Selection, tree: Tree, sources: dict[str, Path]
    ) -> None:
        unpacked = load_layer(self._files_path(layer.descriptor.digest))
        places = {file.entry.path: file for file in unpacked.files}
        for entry in unpacked.entries:
            if not selection.wants_path(layer.kind, entry.path):
                continue
            if isinstance(entry, HardLinkEntry):
                # every file of a tree is a hard link: this is one name more, whether or not the
                # first one is wanted
                first = places[entry.target]
                tree.add(replace(first.entry, path=entry.path))
                sources[entry.path] = first.source
                continue
            tree.add(entry)
            if isinstance(entry, FileEntry):
                sources[entry.path] = places[entry.path].source

    def _tree_path(self, digest: Digest, selection: Selection) -> Path:
        return self.root / tree_name(digest, selection.key)

    def build(
        self,
        model: Model,
        selection: Selection,
        planned: tuple[Tree, Mapping[str, Path]],
        stop: threading.Event,
    ) -> ModelTree:
        """Build the tree in a worker thread; :meth:`add_tree` then records it."""
        path = self._tree_path(model.digest, selection)
        path.parent.mkdir(mode=0o755, exist_ok=True)
        if path.exists():
            # whole, as it was renamed into place: its builder was killed before it could record it,
            # or it was found to be damaged; volumes may be bound to it already
            heal_tree(Wanted.of(planned), path, stop)
            size, files = measure_tree(planned[0])
        else:
            room = self.rooms.room(tree_name(model.digest, selection.key))
            size, files = build_tree(*planned, path, room.grow, stop)
        return ModelTree(path, model.digest, size, files)

    def add_tree(self, tree: ModelTree, model: Model, selection: Selection) -> None:
        """Record a tree that was built, and what it is made of."""
        contents = map(content_name, selection.layers(model))
        self.space.holdings.use(tree_name(model.digest, selection.key), contents)
        self.catalog.add_model(model.digest, selection.key, tree.size, tree.files)
        self.damages.remove([tree_name(model.digest, selection.key)])

    def is_damaged(self, digest: Digest, selection: str) -> bool:
        """Whether a tree was found to be damaged, and has not been put right since."""
        return self.damages.has(tree_name(digest, selection))

    def tree(self, digest: Digest, selection: Selection) -> ModelTree | None:
        """A model's tree if it was built before, is still there, and not known to be damaged."""
        recorded = self.catalog.model(digest, selection.key)
        if recorded is None or self.is_damaged(digest, selection.key):
            return None
        path = self._tree_path(digest, selection)
        if not path.is_dir():
            self.catalog.remove_model(digest, selection.key)
            return None
        return ModelTree(path, digest, *recorded)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise InProgress(
            f"the store at {path.parent} is in use by process {holder}", root=path.parent
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise ModelError(f"{path} cannot be locked: {error.strerror}") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
