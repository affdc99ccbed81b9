"""csi-sanity, the conformance suite of the CSI project, against the driver as it ships.

``make sanity`` builds it from ``sanity/go.mod``. What it skips may only be what the driver
truthfully does not advertise: :data:`NOT_ADVERTISED` is the whole list, and a spec that is skipped
for another reason, or no longer, fails here.
"""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.driver import serve_driver
from tests.support.layouts import push_modctl_layout
from tests.support.mounts import mounts_below

if TYPE_CHECKING:
    from tests.support.registry import RegistryServer

REPOSITORY = Path(__file__).parents[2]
CSI_SANITY = REPOSITORY / ".tools/csi-sanity"

NOT_ADVERTISED = Counter(
    {
        # volumes are not attached: the registry is reached from every node
        "ControllerPublishVolume not supported": 7,
        "ControllerUnpublishVolume not supported": 1,
        "Controller Publish, UnpublishVolume not supported": 2,
        # a model is what its artifact is: no snapshots, copies, sizes or changes of it
        "Snapshot not supported": 2,
        "ListSnapshots not supported": 7,
        "GetSnapshot not supported": 3,
        "DeleteSnapshot not supported": 3,
        "CreateSnapshot not supported": 5,
        "Volume Cloning not supported": 2,
        "Modify volume not supported": 1,
        "Modify Volume not supported": 1,
        "ControllerModifyVolume not supported": 6,
        "ControllerExpandVolume not supported": 3,
        "NodeExpandVolume not supported": 4,
        "GetCapacity not supported": 1,
        "GroupControllerService not supported": 6,
        # one mount per volume and pod, bound from the node's store: nothing to stage
        "NodeStageVolume not supported": 3,
        "NodeUnstageVolume not supported": 2,
        # volumes are read-only: there are no writers to tell apart
        "Service does not have single node multi writer capability": 1,
    }
)


@dataclass(frozen=True)
class Results:
    """What the JUnit report says."""

    passed: int
    failed: dict[str, str]
    skipped: Counter[str]
    pending: int

    def __str__(self) -> str:
        return (
            f"csi-sanity: {self.passed} passed, {len(self.failed)} failed, "
            f"{self.skipped.total()} skipped, {self.pending} pending"
        )


@pytest.mark.timeout(300)
def test_csi_sanity(tmp_path: Path, registry: RegistryServer) -> None:
    assert CSI_SANITY.exists(), "run 'make sanity', which builds it"
    reference = push_modctl_layout(registry, "sanity/tiny", "raw")
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(f"model.csi.example.org/reference: {reference}\n")
    with serve_driver(tmp_path / "driver") as driver:
        report = tmp_path / "report.xml"
        done = subprocess.run(
            [
                str(CSI_SANITY),
                "--ginkgo.no-color",
                f"--ginkgo.junit-report={report}",
                f"--csi.endpoint={driver.endpoint}",
                f"--csi.mountdir={driver.kubelet_dir}/pods/csi-sanity-mount",
                f"--csi.stagingdir={driver.kubelet_dir}/pods/csi-sanity-staging",
                f"--csi.testvolumeparameters={parameters}",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        left = mounts_below(driver.kubelet_dir)
        log = driver.log.read_text(errors="replace")
    assert report.exists(), done.stdout + done.stderr
    results = read_report(report)
    for line in re.findall(r"^Ran \d+ of \d+ Specs.*$", done.stdout, re.MULTILINE):
        print(line)
    print(results)
    assert not results.failed, f"{results.failed}\n{log[-8000:]}"
    assert done.returncode == 0, done.stdout
    assert results.skipped == NOT_ADVERTISED
    assert not left


def read_report(report: Path) -> Results:
    passed, failed, skipped, pending = 0, {}, Counter[str](), 0
    # written by the program that was just run
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314
        name, status = case.get("name", ""), case.get("status", "")
        if status == "passed":
            passed += 1
        elif status == "pending":
            pending += 1
        elif status == "skipped":
            reason = case.find("skipped")
            message = "" if reason is None else reason.get("message", "")
            skipped[message.removeprefix("skipped - ")] += 1
        else:
            failed[name] = "".join(case.itertext())[-2000:]
    return Results(passed, failed, skipped, pending)
