"""Versions of TorchRL: one short module of differences, and sentences that name a version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torchrl

from torchrl_happo import versions


def test_all_of_it_is_one_short_module():
    """150 lines."""
    assert len(Path(versions.__file__).read_text().splitlines()) <= 150


def test_a_feature_of_a_newer_version_is_refused_in_a_sentence(monkeypatch):
    """Compared as numbers: 0.9 is older than 0.11."""
    monkeypatch.setattr(torchrl, "__version__", "0.9.3")
    assert versions.needed("value_norm", "0.9") is None
    words = r"value_norm needs TorchRL 0\.14 or newer, but 0\.9\.3 is installed; run pip install"
    assert versions.needed("value_norm", "0.14").startswith(words.replace("\\", ""))
    kind = versions.newer("ValueNorm", "torchrl.modules", "0.14")
    assert kind.__name__ == "ValueNorm"
    with pytest.raises(ImportError, match=r"ValueNorm needs TorchRL 0\.14"):
        kind(shape=1)
    assert versions.since("0.14", shape=1) == {}
    assert versions.since("0.9", shape=1) == {"shape": 1}
