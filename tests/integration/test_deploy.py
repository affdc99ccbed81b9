"""``deploy/`` is what Kubernetes takes, what the command line knows and what the image holds.

No cluster and no image builder is needed: the manifests are held against Kubernetes' own schemas,
their arguments against the driver's, and the image's recipe is followed as far as it is Python.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate  # type: ignore[import-untyped]  # ships no types
import pytest
import yaml

from csi.attributes import VolumeAttributes
from csi.config import Config, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

Document = dict[str, Any]

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
MANIFESTS = sorted(path for path in DEPLOY.glob("*.yaml") if path.name != "kustomization.yaml")
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))
POLICIES = sorted((DEPLOY / "policies").glob("*.yaml"))
NAMESPACE = "model-csi"
DRIVER = "model.csi.example.org"
CLUSTER_WIDE = {"Namespace", "CSIDriver", "ClusterRole", "ClusterRoleBinding"}
# the oldest that is still asked for by managed clusters, and the newest that is known here
KUBERNETES = ("1.28", kubernetes_validate.latest_version())


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as it is for the API server."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        assert len(mapping) == len(node.value), f"a key stands twice: {node.start_mark}"
        return mapping


def documents(*paths: Path) -> list[Document]:
    return [
        document
        for path in paths
        for document in yaml.load_all(path.read_text(), Loader=_UniqueKeys)
    ]


def of_kind(*kinds: str) -> list[Document]:
    return [document for document in documents(*MANIFESTS) if document["kind"] in kinds]


def name_of(document: Document) -> str:
    return str(document["metadata"]["name"])


def workloads() -> dict[str, Document]:
    return {name_of(workload): workload for workload in of_kind("DaemonSet", "Deployment")}


def pod_of(workload: str) -> Document:
    pod: Document = workloads()[workload]["spec"]["template"]["spec"]
    return pod


def containers() -> Iterator[tuple[Document, Document]]:
    for workload in workloads().values():
        pod = workload["spec"]["template"]["spec"]
        yield from ((pod, container) for container in pod["containers"])


def driver_container(workload: str) -> Document:
    (container,) = [one for one in pod_of(workload)["containers"] if one["name"] == "model-csi"]
    return dict(container)


def driver_flags(workload: str) -> dict[str, str]:
    command, *arguments = driver_container(workload)["args"]
    assert command == "serve"
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


# ------------------------------------------------------------------------------------ manifests


def test_the_kustomization_takes_every_manifest() -> None:
    (kustomization,) = documents(DEPLOY / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]
    (image,) = kustomization["images"]
    used = [container["image"] for _, container in containers()]
    assert used.count(image["name"]) == len(workloads())


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", [*MANIFESTS, *EXAMPLES], ids=lambda path: path.name)
def test_kubernetes_takes_it_strictly(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_names_are_unique_and_in_the_namespace() -> None:
    everything = documents(*MANIFESTS)
    names = [(document["kind"], name_of(document)) for document in everything]
    assert len(names) == len(set(names))
    for document in everything:
        expected = None if document["kind"] in CLUSTER_WIDE else NAMESPACE
        assert document["metadata"].get("namespace") == expected, name_of(document)
    assert ("Namespace", NAMESPACE) in names


def test_selectors_match_their_pods_and_no_others() -> None:
    labels = {
        name: workload["spec"]["template"]["metadata"]["labels"]
        for name, workload in workloads().items()
    }
    for name, workload in workloads().items():
        selector = workload["spec"]["selector"]["matchLabels"].items()
        assert [other for other, found in labels.items() if selector <= found.items()] == [name]


def test_every_mount_has_its_volume() -> None:
    for pod, container in containers():
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted <= volumes, container["name"]
    for pod in (pod_of(workload) for workload in workloads()):
        everywhere = {m["name"] for one in pod["containers"] for m in one["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == everywhere


def test_every_other_image_is_pinned() -> None:
    for _, container in containers():
        if container["image"] != "model-csi":
            assert re.fullmatch(r"registry\.k8s\.io/[a-z/-]+:v\d+\.\d+\.\d+", container["image"])


def test_the_driver_has_one_name_everywhere() -> None:
    (csi_driver,) = of_kind("CSIDriver")
    assert name_of(csi_driver) == DRIVER
    assert all(driver_flags(workload)["driver-name"] == DRIVER for workload in workloads())
    folder = f"/var/lib/kubelet/plugins/{DRIVER}"
    pod = pod_of("model-csi-node")
    assert {"path": folder, "type": "DirectoryOrCreate"} in [
        volume.get("hostPath") for volume in pod["volumes"]
    ]
    (registrar,) = [one for one in pod["containers"] if one["name"] == "node-driver-registrar"]
    assert f"--kubelet-registration-path={folder}/csi.sock" in registrar["args"]


def test_the_node_plugin_shows_its_mounts_to_the_node() -> None:
    container = driver_container("model-csi-node")
    flags = driver_flags("model-csi-node")
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[f"{flags['kubelet-dir']}/pods"]["mountPropagation"] == "Bidirectional"
    assert container["securityContext"]["privileged"] is True
    volumes = {volume["name"]: volume for volume in pod_of("model-csi-node")["volumes"]}
    # target paths are the node's: they have to be the same inside
    for path in (flags["root"], f"{flags['kubelet-dir']}/pods"):
        assert volumes[mounts[path]["name"]]["hostPath"]["path"] == path


def test_what_serves_lazy_volumes_outlives_the_plugins_container() -> None:
    pod, container = pod_of("model-csi-node"), driver_container("model-csi-node")
    flags = driver_flags("model-csi-node")
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    # neither the end of a PID namespace nor that of a cgroup ends them, and the next one sees them
    assert pod["hostPID"] is True
    assert Path(flags["worker-cgroup"]).parent == Path("/sys/fs/cgroup")
    assert "readOnly" not in mounts["/sys/fs/cgroup"]
    assert mounts[flags["root"]]["mountPropagation"] == "Bidirectional"
    (csi_driver,) = of_kind("CSIDriver")
    assert csi_driver["spec"]["requiresRepublish"] is True


def test_the_node_plugin_is_on_every_node_and_stays() -> None:
    pod = pod_of("model-csi-node")
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"


# --------------------------------------------------------------------------------------- rights


def test_nothing_but_the_node_plugin_is_privileged() -> None:
    for _, container in containers():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        if context.get("privileged"):
            assert container == driver_container("model-csi-node")
        else:
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod_of("model-csi-controller")["securityContext"]["runAsNonRoot"] is True


def test_rights_are_the_provisioners_alone() -> None:
    accounts = {name_of(account) for account in of_kind("ServiceAccount")}
    assert {pod_of(workload)["serviceAccountName"] for workload in workloads()} == accounts
    roles = {(role["kind"], name_of(role)) for role in of_kind("ClusterRole", "Role")}
    bindings = of_kind("ClusterRoleBinding", "RoleBinding")
    assert {(one["roleRef"]["kind"], one["roleRef"]["name"]) for one in bindings} == roles
    subjects = [subject for binding in bindings for subject in binding["subjects"]]
    assert {(one["namespace"], one["name"]) for one in subjects} == {
        (NAMESPACE, "model-csi-controller")
    }


def test_rights_have_no_wildcards_and_no_secrets_of_other_namespaces() -> None:
    for role in of_kind("ClusterRole", "Role"):
        for rule in role["rules"]:
            assert not {"*"} & {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert role["kind"] == "Role" or "secrets" not in rule["resources"]


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("workload", ["model-csi-node", "model-csi-controller"])
def test_the_arguments_are_a_configuration(workload: str) -> None:
    flags = driver_flags(workload)
    variables = {one["name"] for one in driver_container(workload).get("env", ())}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(flags.values()))) <= variables
    given = {flag: re.sub(r"\$\(\w+\)", "node-1", value) for flag, value in flags.items()}
    config = Config.load(given, {}, None)
    assert config.mode == workload.removeprefix("model-csi-")
    known = {setting.environment for setting in settings()}
    assert {name for name in variables if name.startswith("MODEL_CSI_")} <= known


def test_the_command_line_knows_every_flag() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "csi", "serve", "--help"], capture_output=True, text=True, check=True
    )
    known = set(re.findall(r"--[a-z-]+", done.stdout))
    for workload in workloads():
        assert {f"--{flag}" for flag in driver_flags(workload)} <= known


def test_probes_and_sockets_meet() -> None:
    for workload in workloads():
        driver = driver_container(workload)
        (port,) = driver["ports"]
        assert driver["livenessProbe"]["httpGet"]["port"] == port["name"]
        for sidecar in pod_of(workload)["containers"]:
            if sidecar["name"] == "model-csi":
                continue
            assert "--csi-address=/csi/csi.sock" in sidecar["args"]
            if sidecar["name"] == "liveness-probe":
                assert f"--health-port={port['containerPort']}" in sidecar["args"]
        assert driver_flags(workload)["endpoint"] == "unix:///csi/csi.sock"


# ------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_attributes_are_the_drivers(path: Path) -> None:
    found = 0
    for document in documents(path):
        if document["kind"] == "StorageClass":
            assert document["provisioner"] == DRIVER
            VolumeAttributes.parse(document["parameters"], DRIVER)
            found += 1
        if document["kind"] == "Pod":
            for volume in document["spec"]["volumes"]:
                if inline := volume.get("csi"):
                    assert inline["driver"] == DRIVER
                    VolumeAttributes.parse(inline["volumeAttributes"], DRIVER)
                    found += 1
    assert found


# ------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("version", ["1.30", KUBERNETES[-1]])
@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_kubernetes_takes_the_policies_strictly(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_policies_look_at_the_drivers_attribute_and_are_bound() -> None:
    policies = {name_of(one): one for one in documents(*POLICIES) if "Binding" not in one["kind"]}
    bindings = [one for one in documents(*POLICIES) if "Binding" in one["kind"]]
    assert sorted(one["spec"]["policyName"] for one in bindings) == sorted(policies)
    resources = set()
    for policy in policies.values():
        spec = policy["spec"]
        assert spec["failurePolicy"] == "Fail"
        (rule,) = spec["matchConstraints"]["resourceRules"]
        resources |= set(rule["resources"])
        text = yaml.safe_dump(spec, width=10_000)
        assert set(re.findall(r"([\w.]+)/reference", text)) == {DRIVER}
        assert f"driver == ''{DRIVER}''" in text or f"driver == '{DRIVER}'" in text
        (allowed,) = [one for one in spec["variables"] if one["name"] == "allowed"]
        # a prefix that does not end with a slash is one for names that only look like it
        assert all(entry.endswith("/") for entry in re.findall(r"'([^']*)'", allowed["expression"]))
    assert resources == {"pods", "persistentvolumes"}


# ---------------------------------------------------------------------------------------- image


def copied_into_the_image() -> list[str]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    return [source for copy in copies for source in copy if not copy[0].startswith("--from=")]


def test_the_image_gets_what_its_recipe_copies() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for source in copied_into_the_image():
        assert (REPOSITORY / source).exists(), source
        assert f"!{source}" in ignored


def test_the_image_holds_every_module(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name in copied_into_the_image():
        if (REPOSITORY / name).is_dir():
            shutil.copytree(
                REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(REPOSITORY / name, source / name)
    build = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    subprocess.run(
        [sys.executable, "-m", *build, "--wheel-dir", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for package in ("csi", "fetcher", "proto"):
        modules = {
            str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / package).rglob("*.py")
        }
        assert modules <= packed
        # typed packages stay typed
        assert f"{package}/py.typed" in packed or package == "proto"


def test_the_images_lock_is_a_part_of_the_developers() -> None:
    pins = [
        set(re.findall(r"^([a-z0-9_.-]+==[^ ;\\]+)", (REPOSITORY / lock).read_text(), re.MULTILINE))
        for lock in ("requirements.lock", "requirements-dev.lock")
    ]
    assert pins[0] < pins[1]
