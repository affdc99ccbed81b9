"""Reading the YAML file of settings; a module of its own, as most commands have none to read."""

from pathlib import Path
from typing import Any, Final

import yaml

from fetcher.errors import InvalidRequest

MAX_CONFIG_BYTES: Final = 1024 * 1024


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name a key once: the second of two would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a key stands here twice", node.start_mark
            )
        return mapping


def read_config_file(file: Path) -> dict[Any, Any]:
    """What the file says, by key; keys and values are not checked yet.

    Raises :class:`InvalidRequest` if it cannot be read or is no mapping.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"the configuration file {file}: {error.strerror}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise InvalidRequest(f"{file} has more than {MAX_CONFIG_BYTES} bytes: not a configuration")
    try:
        # _UniqueKeys is a SafeLoader: only plain values, no objects
        document = yaml.load(content, Loader=_UniqueKeys)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError, TypeError) as error:
        raise InvalidRequest(f"{file} is not YAML: {str(error)[:400]}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InvalidRequest(f"{file} has to be a mapping of settings, such as 'connections: 8'")
    return document
