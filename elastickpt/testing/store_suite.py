"""The suite that every store passes. Subclass `StoreSuite` as a pytest class and override its fixture `store`.

    class TestMyStore(StoreSuite):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(...)          # empty

Where a store declares that it lacks a capability, the tests that need it demand CapabilityMissing by that name instead. A
package registers its store by an entry point of the group `elastickpt.stores`: see `storage.opening`.
"""

from __future__ import annotations

import pytest

from elastickpt.storage.store import Store
from elastickpt.testing.file_suite import FileSuite
from elastickpt.testing.name_suite import NameSuite
from elastickpt.testing.range_suite import RangeSuite


class StoreSuite(FileSuite, RangeSuite, NameSuite):
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("override the fixture `store`: a new, empty store")
