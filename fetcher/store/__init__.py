"""The store: the only code that writes below the root."""

from fetcher.store.catalog import StoredModel
from fetcher.store.database import Database
from fetcher.store.space import Limits
from fetcher.store.store import Store
from fetcher.store.trees import ModelTree

__all__ = ["Database", "Limits", "ModelTree", "Store", "StoredModel"]
