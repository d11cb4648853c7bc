"""The client of all tests that speak HTTP."""

from __future__ import annotations

import httpx2

# One client, since each makes a TLS context, which takes longer than a request. It is patient, since the tests' server
# shares its cores with other tests; and it keeps no connection, which a server may be closing just then.
CLIENT = httpx2.Client(timeout=120, limits=httpx2.Limits(max_keepalive_connections=0))
