"""Every file in cluster/ against the schema of its reader, the versions, the flags, and the rule "no secrets".

A check is a function from a file's text to its problems. Each is run on the file, where it must find none, and on
copies with one deliberate mistake, where it must find one.
"""

import functools
import importlib.resources
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY_SCHEMAS = ROOT.parent / "shared" / "schemas"

Check = Callable[[str], list[str]]


def check_compose(text: str) -> list[str]:
    schema = json.loads(
        (importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text()
    )
    return _schema_problems(yaml.safe_load(text), schema)


def check_compose_ports(text: str) -> list[str]:
    """Nothing is published beyond this machine, and nothing secret has a default."""
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    variables = re.findall(r"\$\{?(\w+)([^}\s]*)", text)
    known = set(re.findall(r"^(\w+)=$", (CLUSTER / "env.example").read_text(), re.MULTILINE))
    return [
        *(f"port {port} is open beyond loopback" for port in published if not port.startswith("127.0.0.1:")),
        *(f"${name} has a default or none required" for name, rest in variables if not rest.startswith(":?")),
        *(f"${name} is not in env.example" for name, _ in variables if name not in known),
    ]


def check_ray_cluster(text: str) -> list[str]:
    """Ray's schema, what `ray up` validates beyond it, and EC2's own model of the node configurations."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load(text)
    schema = json.loads((importlib.resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    problems = _schema_problems(config, schema)
    if problems:
        return problems
    try:
        util.validate_config(util.prepare_config(yaml.safe_load(text)))
    except Exception as error:  # whatever Ray raises is a problem of the file
        problems.append(f"{type(error).__name__}: {error}")
    session = pytest.importorskip("botocore.session").get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    validator = pytest.importorskip("botocore.validate").ParamValidator()
    for name, node in config["available_node_types"].items():
        report = validator.validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            problems.append(f"{name}: {report.generate_report()}")
    return problems


def check_aws_is_closed(text: str) -> list[str]:
    """Token on, SSH through Systems Manager, own security group, roles by name, workers on spot from zero."""
    config = yaml.safe_load(text)
    workers = [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]
    nodes = [node["node_config"] for node in config["available_node_types"].values()]
    rules = {
        "token authentication is off": "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"],
        "nodes have public addresses": config["provider"]["use_internal_ips"],
        "SSH needs an open port": "ssm start-session" in config["auth"]["ssh_proxy_command"],
        # without a group of ours Ray makes one that lets the world reach port 22
        "a node is in Ray's default security group": all(node.get("SecurityGroupIds") for node in nodes),
        "a node has no role by name": all(node.get("IamInstanceProfile", {}).get("Name") for node in nodes),
        "workers do not go away": all(node["min_workers"] == 0 for node in workers),
        "workers are not on spot": all(
            node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot" for node in workers
        ),
        "set-up commands instead of an image": not any(config[k] for k in config if k.endswith("setup_commands")),
    }
    return [problem for problem, holds in rules.items() if not holds]


def check_rayjob(text: str) -> list[str]:
    schemas = KUBERAY_SCHEMAS / "rayjobs.json"
    if not schemas.is_file():
        pytest.skip("KubeRay's schemas are not beside the project: ../shared/schemas/rayjobs.json")
    served = json.loads(schemas.read_text())
    problems = []
    for document in _kubernetes_objects(text):
        if document["kind"] == "RayJob":
            version = document["apiVersion"].removeprefix("ray.io/")
            problems += _schema_problems(document, _closed(served[version]))
    return problems


def check_kubernetes(text: str) -> list[str]:
    """Plain objects, and each pod template as the Pod that KubeRay makes of it."""
    validator = pytest.importorskip("kubernetes_validate")
    problems = []
    for document in _kubernetes_objects(text):
        plain = [document] if document["kind"] != "RayJob" else _pods(document)
        for thing in plain:
            try:
                validator.validate(thing, validator.latest_version(), strict=True)
            except Exception as error:  # jsonschema's and the package's own errors share no base
                problems.append(f"{thing['kind']}: {error}")
    return problems


def check_rayjob_rules(text: str) -> list[str]:
    """Token on, GPUs from zero, every container limited, settings and Secrets that exist."""
    documents = {document["kind"]: document for document in _kubernetes_objects(text)}
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    containers = [
        container
        for pod in _pods(documents["RayJob"])
        for container in pod["spec"]["initContainers"] + pod["spec"]["containers"]
    ]
    maps = {
        source["configMapRef"]["name"]
        for container in containers
        for source in container["envFrom"]
        if "configMapRef" in source
    }
    rules = {
        "token authentication is off": cluster.get("authOptions", {}).get("mode") == "token",
        "GPU workers stay": all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"]),
        "the cluster stays": documents["RayJob"]["spec"]["shutdownAfterJobFinishes"],
        "a container has no requests or limits": all(
            container.get("resources", {}).keys() >= {"requests", "limits"} for container in containers
        ),
        "a ConfigMap is missing": maps == {documents["ConfigMap"]["metadata"]["name"]},
        "the study's URL does not come from a Secret": any(
            variable["name"] == "DSKD_STUDY_STORAGE" and "secretKeyRef" in variable.get("valueFrom", {})
            for container in containers
            for variable in container.get("env", [])
        ),
    }
    return [problem for problem, holds in rules.items() if not holds]


def check_policy(text: str) -> list[str]:
    """No wildcard right, S3 rights on one bucket only, EC2 actions that exist."""
    session = pytest.importorskip("botocore.session").get_session()
    ec2 = set(session.get_service_model("ec2").operation_names)
    policy = json.loads(text)
    problems = [] if policy["Version"] == "2012-10-17" else [f"version {policy['Version']}"]
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        for action in actions:
            service, _, name = action.partition(":")
            if "*" in action:
                problems.append(f"{statement['Sid']}: {action}")
            if service == "s3" and not statement["Resource"].startswith("arn:aws:s3:::DSKD_BUCKET"):
                problems.append(f"{statement['Sid']}: {action} on {statement['Resource']}")
            if service == "ec2" and name not in ec2:
                problems.append(f"{statement['Sid']}: EC2 has no {name}")
    return problems


def check_dockerfile(text: str) -> list[str]:
    steps = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if re.match(r"[A-Z]", line)]
    of = {name: [rest for step, rest in steps if step == name] for name in ("FROM", "USER", "HEALTHCHECK", "RUN")}
    sent = set(re.findall(r"^!(.+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    copied = [
        source
        for step, rest in steps
        if step == "COPY" and "--from=" not in rest
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    ]
    rules = {
        "one stage only": len(of["FROM"]) > 1,
        "a stage is not on the official Ray GPU image": all(
            re.match(r"rayproject/ray:[\d.]+-py311-gpu\b", base) for base in of["FROM"]
        ),
        "runs as root": of["USER"][-1:] not in ([], ["root"], ["0"]),
        "no health check": len(of["HEALTHCHECK"]) == 1,
        "unpinned dependencies": any("--constraint" in run and "constraints.txt" in run for run in of["RUN"]),
    }
    return [
        *(problem for problem, holds in rules.items() if not holds),
        *(f"copies {source}, which is not there" for source in copied if not (ROOT / source).exists()),
        *(f"copies {source}, which .dockerignore holds back" for source in copied if source not in sent),
    ]


def check_versions(text: str) -> list[str]:
    """Ray as in constraints.txt, our own version as in pyproject.toml, every image by an exact tag."""
    pins = (ROOT / "constraints.txt").read_text()
    ray = re.findall(r"^ray==(\S+)", pins, re.MULTILINE)[0]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = re.findall(r"^\s*(?:image: |FROM )(\S+)", text, re.MULTILINE)
    return [
        *(f"{image} has no exact tag" for image in images if not re.search(r":\d[\w.]*\.\d+[\w.-]*$", image)),
        *(f"image of Ray {found}" for found in re.findall(r"rayproject/ray:([\d.]+)", text) if found != ray),
        *(f"dskd {found}" for found in re.findall(r"\bdskd:([\d.]+)-ray", text) if found != ours),
        *(f"Ray {found}" for found in re.findall(r"-ray([\d.]+\d)", text) if found != ray),
        *(f"rayVersion {found}" for found in re.findall(r'rayVersion: "?([\d.]+)', text) if found != ray),
    ]


def check_commands(text: str) -> list[str]:
    """Entries exist, and so does every flag in their --help."""
    problems = []
    for entry, words in _commands(text):
        if not (ROOT / entry).exists():
            problems.append(f"there is no {entry}")
            continue
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", words))
        problems += [f"{entry} has no {flag}" for flag in sorted(flags - _flags_of(entry))]
    return problems


def check_secrets(text: str) -> list[str]:
    patterns = {
        "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
        "password in a URL": r"://[^\s:/@'\"]+:(?!\$\{|PASSWORD@|…@)[^\s:/@'\"]+@",
        "random-looking value": r"\b(?=[0-9a-zA-Z+/]*\d)(?=[0-9a-zA-Z+/]*[a-zA-Z])[0-9a-zA-Z+/]{32,}\b",
        # a name that means a secret, then a value that is neither a reference nor a switch
        "literal secret": r"(?i)\b\w*(?:passw(?:or)?d|secret|token|access_key(?:_id)?|api_key)\b['\"]?[ \t]*[:=]"
        r"[ \t]*['\"]?(?!\$|~|true\b|false\b|required\b)[^\s,'\"{}\[\]()`]{4,}",
    }
    return [f"{name}: {match[0]}" for name, pattern in patterns.items() for match in re.finditer(pattern, text)]


FILES = sorted(str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file())
CHECKS: list[tuple[str, Check]] = [
    ("compose.yaml", check_compose),
    ("compose.gpu.yaml", check_compose),
    ("compose.yaml", check_compose_ports),
    ("aws.yaml", check_ray_cluster),
    ("aws.yaml", check_aws_is_closed),
    ("kuberay/rayjob.yaml", check_rayjob),
    ("kuberay/rayjob.yaml", check_rayjob_rules),
    ("kuberay/rayjob.yaml", check_kubernetes),
    ("s3-policy.json", check_policy),
    ("head-policy.json", check_policy),
    ("Dockerfile", check_dockerfile),
    ("kuberay/rayjob.yaml", check_commands),
    ("README.md", check_commands),
    *((name, check_versions) for name in FILES),
    *((name, check_secrets) for name in FILES),
]
MISTAKES: list[tuple[str, Check, str, str]] = [
    ("compose.yaml", check_compose, "healthcheck:", "health_check:"),
    ("compose.yaml", check_compose, "restart: unless-stopped", "restart: [always]"),
    ("compose.gpu.yaml", check_compose, "gpus: all", "gpu: all"),
    ("compose.yaml", check_compose_ports, "127.0.0.1:5000:5000", "5000:5000"),
    ("compose.yaml", check_compose_ports, "${RAY_AUTH_TOKEN:?", "${RAY_AUTH_TOKEN:-"),
    ("compose.yaml", check_compose_ports, "${DSKD_DATA:?", "${DSKD_IMAGES:?"),
    ("aws.yaml", check_ray_cluster, "cluster_name:", "name:"),
    ("aws.yaml", check_ray_cluster, "head_node_type: head", "head_node_type: boss"),
    ("aws.yaml", check_ray_cluster, "ssh_proxy_command: aws", "ssh_proxy: aws"),
    ("aws.yaml", check_ray_cluster, "max_workers: 8\n    resources", "max_workers: many\n    resources"),
    ("aws.yaml", check_ray_cluster, "InstanceMarketOptions:", "MarketOptions:"),
    ("aws.yaml", check_ray_cluster, "VolumeSize: 200", "VolumeSize: big"),
    ("aws.yaml", check_aws_is_closed, "-e RAY_AUTH_MODE=token", "-e RAY_AUTH_MODE=disabled"),
    ("aws.yaml", check_aws_is_closed, "SecurityGroupIds:", "SecurityGroups:"),
    ("aws.yaml", check_aws_is_closed, "use_internal_ips: true", "use_internal_ips: false"),
    ("aws.yaml", check_aws_is_closed, "min_workers: 0", "min_workers: 1"),
    ("aws.yaml", check_aws_is_closed, "MarketType: spot", "MarketType: capacity-block"),
    ("aws.yaml", check_aws_is_closed, "\nsetup_commands: []", "\nsetup_commands: [pip install dskd]"),
    ("kuberay/rayjob.yaml", check_rayjob, "rayClusterSpec:", "rayClusterConfig:"),
    ("kuberay/rayjob.yaml", check_rayjob, "maxReplicas: 4", "maxReplicas: four"),
    ("kuberay/rayjob.yaml", check_rayjob, "rayStartParams:", "rayStartParameters:"),
    ("kuberay/rayjob.yaml", check_rayjob, "mode: token", "mode: password"),
    ("kuberay/rayjob.yaml", check_rayjob, "sizeLimit: 50Gi", "sizeLimits: 50Gi"),
    ("kuberay/rayjob.yaml", check_rayjob_rules, "mode: token", "mode: disabled"),
    ("kuberay/rayjob.yaml", check_rayjob_rules, "minReplicas: 0", "minReplicas: 1"),
    ("kuberay/rayjob.yaml", check_rayjob_rules, "secretKeyRef:", "configMapKeyRef:"),
    ("kuberay/rayjob.yaml", check_rayjob_rules, "name: dskd-settings\n", "name: settings\n"),
    ("kuberay/rayjob.yaml", check_rayjob_rules, 'limits: {cpu: "4"', 'limit: {cpu: "4"'),
    ("kuberay/rayjob.yaml", check_kubernetes, "automountServiceAccountToken: false", "automount: false"),
    ("kuberay/rayjob.yaml", check_kubernetes, "\ndata:\n", "\nvalues:\n"),
    ("kuberay/rayjob.yaml", check_kubernetes, "mountPath: /data", "path: /data"),
    ("s3-policy.json", check_policy, '"s3:ListBucket"', '"s3:*"'),
    ("s3-policy.json", check_policy, "arn:aws:s3:::DSKD_BUCKET/searches/*", "*"),
    ("head-policy.json", check_policy, "ec2:RunInstances", "ec2:RunInstance"),
    ("Dockerfile", check_dockerfile, "USER ray", "USER root"),
    ("Dockerfile", check_dockerfile, "HEALTHCHECK", "LABEL health="),
    ("Dockerfile", check_dockerfile, "--constraint /opt/dskd/constraints.txt", ""),
    ("Dockerfile", check_dockerfile, "COPY tune ", "COPY tuner "),
    ("Dockerfile", check_dockerfile, "COPY tune ", "COPY tests "),
    ("Dockerfile", check_dockerfile, "FROM rayproject/ray:", "FROM python:"),
    ("Dockerfile", check_versions, "rayproject/ray:2.", "rayproject/ray:1."),
    ("compose.yaml", check_versions, "dskd:0.", "dskd:9."),
    ("compose.yaml", check_versions, "postgres:17.6", "postgres:latest"),
    ("kuberay/rayjob.yaml", check_versions, 'rayVersion: "2.', 'rayVersion: "1.'),
    ("kuberay/rayjob.yaml", check_versions, "-ray2.", "-ray1."),
    ("kuberay/rayjob.yaml", check_commands, "tune/search.py", "tune/find.py"),
    ("kuberay/rayjob.yaml", check_commands, "--trials", "--trails"),
    ("README.md", check_commands, "--max-concurrent", "--max-trials"),
    ("compose.yaml", check_secrets, "${POSTGRES_PASSWORD:?is missing, see cluster/env.example}", "hunter22"),
    ("compose.yaml", check_secrets, ":${POSTGRES_PASSWORD:?is missing, see cluster/env.example}@", ":hunter22@"),
    ("env.example", check_secrets, "RAY_AUTH_TOKEN=", "RAY_AUTH_TOKEN=swordfish"),
    ("aws.env.example", check_secrets, "DSKD_STUDY_STORAGE=", "DSKD_STUDY_STORAGE=postgresql://u:pw@h/optuna"),
    ("aws.yaml", check_secrets, "provider:", "provider: # " + "AKIA" + "IOSFODNN7EXAMPLE"),
    ("kuberay/rayjob.yaml", check_secrets, "AWS_REGION:", "AWS_SECRET_ACCESS_KEY: abcdEFGH\n  AWS_REGION:"),
    ("README.md", check_secrets, "# Clusters", "# " + "0123456789abcdef" * 3),
    ("README.md", check_secrets, "# Clusters", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
]


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=lambda value: getattr(value, "__name__", value))
def test_file_has_no_problem(name: str, check: Check) -> None:
    assert check((CLUSTER / name).read_text()) == []


@pytest.mark.parametrize(("name", "check", "right", "wrong"), MISTAKES)
def test_mistake_is_found(name: str, check: Check, right: str, wrong: str) -> None:
    text = (CLUSTER / name).read_text()
    assert right in text
    assert check(text.replace(right, wrong, 1)) != []


def test_every_check_is_shown_to_fail() -> None:
    assert {check for _, check in CHECKS} == {check for _, check, _, _ in MISTAKES}


def test_every_manifest_has_a_schema_check() -> None:
    checked = {name for name, check in CHECKS if check not in (check_versions, check_secrets)}
    assert {name for name in FILES if name.endswith((".yaml", ".json"))} <= checked


def test_search_is_submitted_from_every_walk_through() -> None:
    commands = [entry for entry, _ in _commands((CLUSTER / "README.md").read_text())]
    assert commands.count("tune/search.py") == 2  # compose and AWS; on Kubernetes the manifest submits
    assert commands.count("tune/pull.py") == 3
    manifest = list(_commands((CLUSTER / "kuberay/rayjob.yaml").read_text()))
    assert [entry for entry, _ in manifest] == ["tune/search.py"]


def test_no_command_names_the_study_storage() -> None:
    """The search takes the URL, which holds a password, from its environment: job lists and logs never see it."""
    commands = (CLUSTER / "README.md").read_text() + (CLUSTER / "kuberay/rayjob.yaml").read_text()
    assert "--study-storage" not in commands


def _schema_problems(document: Any, schema: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]


def _closed(schema: Any) -> Any:
    """The schema with unknown fields refused wherever it lists the known ones; the API server prunes silently."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    lists_fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if lists_fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _kubernetes_objects(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def _pods(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """The entries of tune/ that a manifest or a walk-through runs, each with the rest of its command."""
    if "kind: RayJob" in text:
        text = "\n".join(d["spec"]["entrypoint"] for d in _kubernetes_objects(text) if d["kind"] == "RayJob")
    for match in re.finditer(r"python (tune/\w+\.py)([^'`\n]*)", text.replace("\\\n", " ")):
        yield match[1], match[2]


@functools.cache
def _flags_of(entry: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, entry, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{entry} --help: {done.stderr[-1000:]}"
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.stdout))
