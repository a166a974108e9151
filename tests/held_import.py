"""A module whose import stands at a gate that the environment names."""

from __future__ import annotations

import os
import pickle

if "KEISEI_TEST_GATE" in os.environ:
    pickle.loads(bytes.fromhex(os.environ["KEISEI_TEST_GATE"])).hold("an import")
