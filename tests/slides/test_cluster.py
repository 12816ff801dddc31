"""The same work on a Dask cluster: a local one, over TCP as a large one would be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from holoslide.errors import ConfigError
from holoslide.slides.cluster import prepare_on_cluster
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare
from tests.slides.drawn import blobs, paint, write_slide


def test_a_cluster_makes_the_very_same_files(cluster: str, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif", paint(blobs((500, 600), reach=0.4)), 1.0)
    (tmp_path / "text.svs").write_bytes(b"no slide")
    jobs = [PrepareJob("one", slide), PrepareJob("text", tmp_path / "text.svs"), PrepareJob("two", slide)]
    seen: list[tuple[int, int]] = []
    results = prepare_on_cluster(
        jobs,
        tmp_path / "a",
        PrepareConfig(),
        cluster,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert [r.slide_id for r in results] == ["one", "text", "two"]
    assert [r.status for r in results] == ["made", "failed", "made"]
    assert "text.svs: is not a slide" in (results[1].reason or "")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    prepare(jobs, tmp_path / "b", PrepareConfig())
    for name in ("one.tif", "two.tif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = prepare_on_cluster(jobs[:1], tmp_path / "a", PrepareConfig(), cluster)
    assert [r.status for r in again] == ["reused"]


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holoslide.slides.cluster.CONNECT_S", 0.5)
    job = PrepareJob("one", tmp_path / "s.tif")
    with pytest.raises(
        ConfigError, match=r"cluster tcp://127\.0\.0\.1:9: no Dask scheduler answers there"
    ) as caught:
        prepare_on_cluster([job], tmp_path / "out", PrepareConfig(), "tcp://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"needs Dask .*pip install 'holoslide\[cluster\]'"):
        prepare_on_cluster([job], tmp_path / "out", PrepareConfig(), "tcp://127.0.0.1:9")
