"""References, registry access, manifests, the blob store and downloads. Knows nothing of CSI."""

import sys

# Where rich and pygments are installed, httpx imports its own command line with both of them: 30 ms
# more for each of our commands to start. None makes that import fail, which httpx is prepared for.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # the documented use of None
