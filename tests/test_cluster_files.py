"""Every file in cluster/ against the schema of its reader, the versions, the flags, and the rule "no secrets".

A check is a function from a file's text, or from the objects that Kustomize renders from an overlay, to its problems.
Each is run on what is there, where it must find none, and on copies with one deliberate mistake, where it must find
one.
"""

import functools
import importlib
import importlib.resources
import json
import os
import re
import shutil
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

CLUSTER_OF = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
"""Where KubeRay's objects describe their own cluster."""

Object = dict[str, Any]
Check = Callable[[str], list[str]]
ObjectsCheck = Callable[[list[Object]], list[str]]


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
    util = importlib.import_module("ray.autoscaler._private.util")
    config = yaml.safe_load(text)
    schema = json.loads((importlib.resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    problems = _schema_problems(config, schema)
    if problems:
        return problems
    try:
        util.validate_config(util.prepare_config(yaml.safe_load(text)))
    except Exception as error:  # whatever Ray raises is a problem of the file
        problems.append(f"{type(error).__name__}: {error}")
    session = importlib.import_module("botocore.session").get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    validator = importlib.import_module("botocore.validate").ParamValidator()
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
        "nodes are told another region": f"-e AWS_REGION={config['provider']['region']}"
        in config["docker"]["run_options"],
        "drivers may wait on a spot node": "dskd_driver" in config["available_node_types"]["head"]["resources"]
        and not any("dskd_driver" in node["resources"] for node in workers),
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


def check_kuberay(objects: list[Object]) -> list[str]:
    """KubeRay's own objects against its schemas, unknown fields refused."""
    problems = []
    for thing in objects:
        if not thing["apiVersion"].startswith("ray.io/"):
            continue
        schemas = KUBERAY_SCHEMAS / f"{thing['kind'].lower()}s.json"
        if not schemas.is_file():
            pytest.skip(f"KubeRay's schemas are not beside the project: ../shared/schemas/{schemas.name}")
        problems += _schema_problems(thing, _served(schemas)[thing["apiVersion"].removeprefix("ray.io/")])
    return problems


def check_kubernetes(objects: list[Object]) -> list[str]:
    """Plain objects, and each pod template of KubeRay's as the Pod that it makes of it."""
    validator = importlib.import_module("kubernetes_validate")
    problems = []
    for thing in (plain for each in objects for plain in _plain(each)):
        try:
            validator.validate(thing, validator.latest_version(), strict=True)
        except Exception as error:  # jsonschema's and the package's own errors share no base
            problems.append(f"{thing['kind']}: {error}")
    return problems


def check_pods(objects: list[Object]) -> list[str]:
    """Every container is limited and unprivileged, every server says when it is ready, every image has one tag."""
    problems = []
    for owner, pod in _pods(objects):
        if not pod.get("securityContext", {}).get("runAsNonRoot"):
            problems.append(f"{owner} may run as root")
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            name = f"{owner}/{container['name']}"
            resources = container.get("resources", {})
            if not {"cpu", "memory"} <= resources.get("requests", {}).keys() & resources.get("limits", {}).keys():
                problems.append(f"{name} has no requests or limits")
            if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
                problems.append(f"{name} may gain privileges")
            if owner.startswith(("Deployment", "StatefulSet")) and "readinessProbe" not in container:
                problems.append(f"{name} is ready before it is")
            problems += check_versions(f"image: {container['image']}")
    return problems


def check_references(objects: list[Object]) -> list[str]:
    """What a pod names is there: ConfigMaps, accounts, claims; Secrets are made in README.md; services find a pod."""
    kinds = {thing["kind"] for thing in objects}
    # an overlay without servers is for those that are there already, and the other way round
    objects = objects + (_part("base") if "NetworkPolicy" not in kinds else [])
    objects = objects + (_part("services") if "Service" not in kinds else [])
    there = {_key(thing) for thing in objects}
    made = {
        (name, key)
        for name, rest in re.findall(r"create secret generic (\S+)(.*)", (CLUSTER / "README.md").read_text())
        for key in ["", *re.findall(r"--from-(?:file|literal)=(\w+)=", rest)]
    }
    problems = [
        f"{thing['kind']} {thing['metadata']['name']} in a manifest" for thing in objects if thing["kind"] == "Secret"
    ]
    pods = dict(_pods(objects))
    for where, thing in [*pods.items(), *((thing["kind"], thing) for thing in objects)]:
        for kind, name, key in _named(thing):
            if kind == "Secret" and (name, key) not in made:
                problems.append(f"{where}: README.md makes no Secret {name} with {key!r}")
            if kind != "Secret" and (kind, name) not in there:
                problems.append(f"{where}: there is no {kind} {name}")
    labels = [thing["spec"]["template"] for thing in objects if thing["kind"] in ("Deployment", "StatefulSet")]
    for service in (thing["spec"] for thing in objects if thing["kind"] == "Service"):
        found = [pod for pod in labels if service["selector"].items() <= pod["metadata"]["labels"].items()]
        ports = {port["name"] for pod in found for each in pod["spec"]["containers"] for port in each["ports"]}
        problems += [f"no pod has the port {p['targetPort']}" for p in service["ports"] if p["targetPort"] not in ports]
    return problems


def check_ray_rules(objects: list[Object]) -> list[str]:
    """Token on, workers from zero or all at once, drivers on the head alone, nobody else's pods let in."""
    derive = importlib.import_module("ray.autoscaler._private.kuberay.autoscaling_config")
    cluster = _ray_cluster(objects)
    spec = cluster["spec"]
    nodes = derive._derive_autoscaling_config_from_ray_cr(cluster)[
        "available_node_types"
    ]  # as Ray's autoscaler reads it
    head = nodes.pop("headgroup")
    head_pod = spec["headGroupSpec"]["template"]["spec"]
    queued = any("kueue.x-k8s.io/queue-name" in thing["metadata"].get("labels", {}) for thing in objects)
    elastic = spec["enableInTreeAutoscaling"] and all(node["min_workers"] == 0 for node in nodes.values())
    gang = not spec["enableInTreeAutoscaling"] and all(
        group["minReplicas"] == group["replicas"] == group["maxReplicas"] for group in spec["workerGroupSpecs"]
    )
    redis = {thing["metadata"]["name"]: thing for thing in _part("services") if thing["kind"] == "Service"}
    host, _, port = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    jobs = [thing["spec"] for thing in objects if thing["kind"] == "RayJob"]
    policies = [thing["spec"] for thing in objects if thing["kind"] == "NetworkPolicy"]
    rules = {
        "token authentication is off": spec.get("authOptions", {}).get("mode") == "token"
        and bool(spec["authOptions"].get("secretName")),
        "workers stay, or come one by one to a queued job": gang if queued else elastic,
        "the head computes": head["resources"]["CPU"] == 0,
        "drivers may wait elsewhere than on the head": "dskd_driver" in head["resources"]
        and not any("dskd_driver" in node["resources"] for node in nodes.values()),
        "the head may go to a spot node": not head_pod.get("tolerations"),
        "the head's autoscaler has no account": head_pod.get("automountServiceAccountToken") is True,
        "the cluster of a job stays": all(job["shutdownAfterJobFinishes"] for job in jobs),
        "Ray's state is kept nowhere": host in redis and int(port) == redis[host]["spec"]["ports"][0]["port"],
        "the study's URL does not come from a Secret": any(
            variable["name"] == "DSKD_STUDY_STORAGE" and "secretKeyRef" in variable.get("valueFrom", {})
            for variable in head_pod["containers"][0]["env"]
        ),
        "other namespaces reach the ports": [policy["podSelector"] for policy in policies] == [{}]
        and all("from" in rule for policy in policies for rule in policy["ingress"]),
    }
    return [problem for problem, holds in rules.items() if not holds]


def check_gpus(objects: list[Object]) -> list[str]:
    """A worker has one GPU and may go to a spot node."""
    groups = _ray_cluster(objects)["spec"]["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in groups]
    limits = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    tolerated = [{each["key"] for each in pod.get("tolerations", [])} for pod in pods]
    return [
        *(f"{limit} GPUs" for limit in limits if limit != "1"),
        *(
            "no spot node is tolerated"
            for keys in tolerated
            if not any("spot" in key or "scaleset" in key for key in keys)
        ),
        *("no GPU node is tolerated" for keys in tolerated if "nvidia.com/gpu" not in keys),
    ]


def check_serving(objects: list[Object]) -> list[str]:
    """Ray Serve and tune/serve.py take the configuration; every pod has the token, from a Secret, and the port."""
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    settings = importlib.import_module("tune.settings.serve").ServeSettings
    service = next(thing for thing in objects if thing["kind"] == "RayService")
    try:
        config = schema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    except ValueError as error:
        return [str(error)]
    problems = []
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        if not hasattr(importlib.import_module(module), name):
            problems.append(f"there is no {application.import_path}")
        try:
            settings(**application.args)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    for owner, pod in _pods(objects):
        container = pod["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        if ports.get("serve") != config.http_options.port:
            problems.append(f"{owner} has no port for Serve")
        tokens = [each for each in container.get("env", []) if each["name"] == "DSKD_PAGE_TOKEN"]
        if not tokens or "secretKeyRef" not in tokens[0].get("valueFrom", {}):
            problems.append(f"{owner} has no token from a Secret")
    return problems


def check_policy(text: str) -> list[str]:
    """No wildcard right, S3 rights on one bucket only, EC2 actions that exist."""
    session = importlib.import_module("botocore.session").get_session()
    ec2 = set(session.get_service_model("ec2").operation_names)
    policy = json.loads(text)
    problems = [] if policy["Version"] == "2012-10-17" else [f"version {policy['Version']}"]
    for statement in policy["Statement"]:
        actions, resources = (
            statement[key] if isinstance(statement[key], list) else [statement[key]] for key in ("Action", "Resource")
        )
        for action in actions:
            service, _, name = action.partition(":")
            if "*" in action:
                problems.append(f"{statement['Sid']}: {action}")
            if service == "s3" and not all(each.startswith("arn:aws:s3:::DSKD_BUCKET") for each in resources):
                problems.append(f"{statement['Sid']}: {action} on {resources}")
            if service == "ec2" and name not in ec2:
                problems.append(f"{statement['Sid']}: EC2 has no {name}")
            if "*" in resources and not name.startswith("Describe"):
                problems.append(f"{statement['Sid']}: {action} on everything")
    return problems


def check_launched_type(text: str) -> list[str]:
    """The head may launch the instance type and the profile of aws.yaml's workers, and nothing else."""
    node = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"]["gpu-worker"]["node_config"]
    launch = next(each for each in json.loads(text)["Statement"] if each["Resource"] == "arn:aws:ec2:*:*:instance/*")
    profile = f"arn:aws:iam::*:instance-profile/{node['IamInstanceProfile']['Name']}"
    wanted = {
        "StringEquals": {"ec2:InstanceType": node["InstanceType"]},
        "ArnLike": {"ec2:InstanceProfile": profile},
    }
    return [] if launch.get("Condition") == wanted else [f"{launch['Sid']}: {launch.get('Condition')}, not {wanted}"]


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
        "a stage is not on the official Ray GPU image": all(base.startswith("${RAY_IMAGE}") for base in of["FROM"])
        and re.search(r"^ARG RAY_IMAGE=rayproject/ray:[\d.]+-py311-gpu$", text, re.MULTILINE) is not None,
        "runs as root": of["USER"][-1:] not in ([], ["root"], ["0"]),
        "no health check": len(of["HEALTHCHECK"]) == 1,
        "unpinned dependencies": all(
            re.search(r"--constraint \S*constraints.txt", run) is not None for run in of["RUN"] if "pip install" in run
        ),
        "builds with whatever is the newest": all(
            "--no-build-isolation" in run for run in of["RUN"] if "pip wheel" in run
        ),
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
    images = re.findall(r"^\s*(?:- )?(?:image: |ARG RAY_IMAGE=|FROM (?!\$))(\S+)", text, re.MULTILINE)
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
        problems += [f"{entry} has no {flag}" for flag in sorted(_flags(words) - _flags_of(entry))]
    return problems


def check_programs(text: str) -> list[str]:
    """Every command of ray and mlflow exists in the installed program, and so do its flags."""
    text = re.sub(r"^\s*#.*$|args:", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    text = re.sub(r"[\[`;&]|CMD,", "\n", text)  # where a command may begin
    text = re.sub(r"\n\s+(?=--)", " ", re.sub(r"[\"',\]]", " ", text))  # a list, or a folded scalar, goes on
    problems = []
    for program, words in re.findall(r"^[ -]*(ray|mlflow) +([a-z][^|>#\n]*)", text, re.MULTILINE):
        words = words.partition(" -- ")[0]
        command = _command(program, words.split())
        if command is None:
            problems.append(f"{program} has no {words.split()[0]}")
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        problems += [f"{program} {command.name} has no {flag}" for flag in sorted(_flags(words) - known)]
    return problems


def check_mlflow_environment(text: str) -> list[str]:
    """Each MLFLOW_ variable is one that the installed MLflow reads."""
    mlflow = importlib.import_module("mlflow.environment_variables")
    known = {name for name in vars(mlflow) if name.startswith("MLFLOW_")}
    known |= {parameter.envvar for parameter in _program("mlflow").commands["server"].params}
    return [f"MLflow reads no {name}" for name in sorted(set(re.findall(r"\bMLFLOW_[A-Z_]+", text)) - known)]


def check_paths(text: str) -> list[str]:
    """Each path below cluster/ that a walk-through names is there."""
    named = re.findall(r"(?<![\w/])(cluster/[\w./-]*\w)", text)
    return [f"there is no {path}" for path in named if not (ROOT / path).exists()]


def check_secrets(text: str) -> list[str]:
    patterns = {
        "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
        "password in a URL": r"://[^\s:/@'\"]+:(?!\$[{(]|PASSWORD@|%s@|…@)[^\s:/@'\"]+@",
        # a path into a list, as in a JSON patch, is none
        "random-looking value": r"\b(?![0-9a-zA-Z+/]*/\d/)(?=[0-9a-zA-Z+/]*\d)"
        r"(?=[0-9a-zA-Z+/]*[a-zA-Z])[0-9a-zA-Z+/]{32,}\b",
        # a name that means a secret, then a value that is neither a reference nor a switch
        "literal secret": r"(?i)\b\w*(?:passw(?:or)?d|secret|token|access_key(?:_id)?|api_key)\b['\"]?[ \t]*[:=]"
        r"[ \t]*['\"]?(?!\$|~|true\b|false\b|required\b)[^\s,'\"{}\[\]()`]{4,}",
    }
    return [f"{name}: {match[0]}" for name, pattern in patterns.items() for match in re.finditer(pattern, text)]


FILES = sorted(str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file())
MANIFESTS = [
    name for name in FILES if name.startswith("kuberay/") and name.endswith(".yaml") and "kustomization" not in name
]
OVERLAYS = ("overlays/small", "overlays/gpu", "overlays/job", "overlays/queued", "overlays/serve", "services")
CHECKS: list[tuple[str, Check]] = [
    ("compose.yaml", check_compose),
    ("compose.gpu.yaml", check_compose),
    ("compose.yaml", check_compose_ports),
    ("compose.yaml", check_programs),
    ("compose.yaml", check_mlflow_environment),
    ("aws.yaml", check_ray_cluster),
    ("aws.yaml", check_aws_is_closed),
    ("aws.yaml", check_programs),
    ("aws.env.example", check_mlflow_environment),
    ("s3-policy.json", check_policy),
    ("head-policy.json", check_policy),
    ("head-policy.json", check_launched_type),
    ("Dockerfile", check_dockerfile),
    ("Dockerfile", check_programs),
    ("kuberay/services/mlflow.yaml", check_programs),
    ("kuberay/services/mlflow.yaml", check_mlflow_environment),
    ("kuberay/base/settings.yaml", check_mlflow_environment),
    ("kuberay/base/raycluster.yaml", check_mlflow_environment),
    ("kuberay/job/rayjob.yaml", check_commands),
    ("README.md", check_commands),
    ("README.md", check_programs),
    ("README.md", check_mlflow_environment),
    ("README.md", check_paths),
    *((name, check_versions) for name in FILES),
    *((name, check_secrets) for name in FILES),
]
OBJECT_CHECKS: list[tuple[str, ObjectsCheck]] = [
    *(
        (overlay, check)
        for overlay in OVERLAYS
        for check in (check_kuberay, check_kubernetes, check_pods, check_references)
    ),
    *((overlay, check_ray_rules) for overlay in OVERLAYS if overlay != "services"),
    *((overlay, check_gpus) for overlay in ("overlays/gpu", "overlays/job", "overlays/queued")),
    ("overlays/serve", check_serving),
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
    ("aws.yaml", check_aws_is_closed, "-e AWS_REGION=eu", "-e AWS_REGION=us"),
    ("aws.yaml", check_aws_is_closed, "{CPU: 0, dskd_driver: 1}", "{CPU: 0}"),
    ("aws.yaml", check_programs, "--autoscaling-config", "--autoscale-config"),
    ("aws.yaml", check_programs, "ray start --address=", "ray join --address="),
    ("aws.env.example", check_mlflow_environment, "MLFLOW_TRACKING_URI=", "MLFLOW_TRACKING_URL="),
    ("compose.yaml", check_programs, '"--allowed-hosts', '"--allow-hosts'),
    ("compose.yaml", check_programs, "ray, start, --head", "ray, start, --heads"),
    ("compose.yaml", check_mlflow_environment, "MLFLOW_BACKEND_STORE_URI", "MLFLOW_BACKEND_URI"),
    ("kuberay/services/mlflow.yaml", check_programs, "--app-name", "--app"),
    ("kuberay/services/mlflow.yaml", check_programs, '"--allowed-hosts', '"--allow-hosts'),
    ("kuberay/services/mlflow.yaml", check_mlflow_environment, "MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_AUTH_CONFIG"),
    ("kuberay/base/settings.yaml", check_mlflow_environment, "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_ARTIFACT_ROOT"),
    ("s3-policy.json", check_policy, '"s3:ListBucket"', '"s3:*"'),
    ("s3-policy.json", check_policy, "arn:aws:s3:::DSKD_BUCKET/searches/*", "*"),
    ("head-policy.json", check_policy, "ec2:RunInstances", "ec2:RunInstance"),
    ("head-policy.json", check_policy, '"arn:aws:ec2:*:*:subnet/*"', '"*"'),
    ("head-policy.json", check_launched_type, "g5.2xlarge", "p5.48xlarge"),
    ("head-policy.json", check_launched_type, "instance-profile/dskd-ray-worker", "instance-profile/*"),
    ("Dockerfile", check_dockerfile, "USER 1000", "USER root"),
    ("Dockerfile", check_dockerfile, "--constraint constraints.txt hatchling", "hatchling"),
    ("Dockerfile", check_dockerfile, "--no-build-isolation ", ""),
    ("Dockerfile", check_programs, '"health-check", "--address"', '"health-check", "--addr"'),
    ("Dockerfile", check_dockerfile, "HEALTHCHECK", "LABEL health="),
    ("Dockerfile", check_dockerfile, "--constraint /opt/dskd/constraints.txt", ""),
    ("Dockerfile", check_dockerfile, "COPY tune ", "COPY tuner "),
    ("Dockerfile", check_dockerfile, "COPY tune ", "COPY tests "),
    ("Dockerfile", check_dockerfile, "RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu", "RAY_IMAGE=python:3.11.9"),
    ("Dockerfile", check_dockerfile, "FROM ${RAY_IMAGE} AS", "FROM python:3.11.9 AS"),
    ("Dockerfile", check_versions, "rayproject/ray:2.", "rayproject/ray:1."),
    ("compose.yaml", check_versions, "dskd:0.", "dskd:9."),
    ("compose.yaml", check_versions, "postgres:17.6", "postgres:latest"),
    ("kuberay/base/raycluster.yaml", check_versions, 'rayVersion: "2.', 'rayVersion: "1.'),
    ("kuberay/base/raycluster.yaml", check_versions, "-ray2.", "-ray1."),
    ("kuberay/services/redis.yaml", check_versions, "redis:7.4.6", "redis:latest"),
    ("kuberay/job/rayjob.yaml", check_commands, "tune/search.py", "tune/find.py"),
    ("kuberay/job/rayjob.yaml", check_commands, "--trials", "--trails"),
    ("README.md", check_commands, "--max-concurrent", "--max-trials"),
    ("README.md", check_programs, "ray up --yes", "ray up --sure"),
    ("README.md", check_programs, "ray job logs --follow", "ray job logs --tail"),
    ("README.md", check_mlflow_environment, "MLFLOW_TRACKING_PASSWORD", "MLFLOW_PASSWORD"),
    ("README.md", check_paths, "cluster/kuberay/overlays/small", "cluster/kuberay/overlays/kind"),
    ("compose.yaml", check_secrets, "${POSTGRES_PASSWORD:?is missing, see cluster/env.example}", "hunter22"),
    ("compose.yaml", check_secrets, ":${POSTGRES_PASSWORD:?is missing, see cluster/env.example}@", ":hunter22@"),
    ("env.example", check_secrets, "RAY_AUTH_TOKEN=", "RAY_AUTH_TOKEN=swordfish"),
    ("aws.env.example", check_secrets, "DSKD_STUDY_STORAGE=", "DSKD_STUDY_STORAGE=postgresql://u:pw@h/optuna"),
    ("kuberay/services/mlflow.yaml", check_secrets, "$(POSTGRES_PASSWORD)@", "hunter22@"),
    ("kuberay/services/redis.yaml", check_secrets, "requirepass ", "password: hunter22 "),
    ("kuberay/base/settings.yaml", check_secrets, "AWS_REGION:", "AWS_SECRET_ACCESS_KEY: abcdEFGH\n  AWS_REGION:"),
    ("aws.yaml", check_secrets, "provider:", "provider: # " + "AKIA" + "IOSFODNN7EXAMPLE"),
    ("README.md", check_secrets, "# Clusters", "# " + "0123456789abcdef" * 3),
    ("README.md", check_secrets, "# Clusters", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
]
CLUSTER_FILE, POSTGRES, MLFLOW = "base/raycluster.yaml", "services/postgres.yaml", "services/mlflow.yaml"
SMALL, GPU, JOB, QUEUED, SERVE = (f"overlays/{name}" for name in ("small", "gpu", "job", "queued", "serve"))
OBJECT_MISTAKES: list[tuple[str, str, ObjectsCheck | None, str, str]] = [
    # (overlay, file, check that must speak up or None where Kustomize itself refuses, right, wrong)
    (SMALL, f"{SMALL}/kustomization.yaml", None, "patches:", "patchez:"),
    (SMALL, f"{SMALL}/kustomization.yaml", None, "../../base", "../../bass"),
    (SMALL, f"{SMALL}/kustomization.yaml", None, "/spec/workerGroupSpecs/0/maxReplicas", "/spec/workerGroups/0/max"),
    (QUEUED, "job/kustomization.yaml", None, "kind: RayCluster", "kind: RayClusters"),
    (SMALL, CLUSTER_FILE, check_kuberay, "authOptions:", "authOption:"),
    (SMALL, CLUSTER_FILE, check_kuberay, "mode: token", "mode: password"),
    (SMALL, CLUSTER_FILE, check_kuberay, "redisAddress:", "redisAdress:"),
    (SMALL, CLUSTER_FILE, check_kuberay, "sizeLimit: 60Gi", "sizeLimits: 60Gi"),
    (GPU, f"{GPU}/kustomization.yaml", check_kuberay, "maxReplicas, value: 8", "maxReplicas, value: eight"),
    (GPU, f"{GPU}/kustomization.yaml", check_kuberay, "path: /spec/workerGroupSpecs/0/template/spec/tolerations",
     "path: /spec/workerGroupSpecs/0/template/tolerations"),
    (JOB, "job/rayjob.yaml", check_kuberay, "backoffLimit: 1", "backoff: 1"),
    (JOB, "job/kustomization.yaml", check_kuberay, "[spec.rayClusterSpec]", "[spec.rayCluster]"),
    (SMALL, "base/settings.yaml", check_kubernetes, "\ndata:\n", "\nvalues: {}\ndata:\n"),
    (SMALL, CLUSTER_FILE, check_kubernetes, "mountPath: /dev/shm", "path: /dev/shm"),
    (SMALL, "base/network.yaml", check_kubernetes, "policyTypes: [Ingress]", "policyTypes: Ingress"),
    (SMALL, f"{SMALL}/s3.yaml", check_kubernetes, "restartPolicy: OnFailure", "restart: OnFailure"),
    ("services", "services/redis.yaml", check_kubernetes, "containerPort: 6379", "containerPort: redis"),
    ("services", POSTGRES, check_kubernetes, "accessModes: [ReadWriteOnce]", "accessMode: [ReadWriteOnce]"),
    ("services", POSTGRES, check_pods, "runAsNonRoot: true", "runAsNonRoot: false"),
    ("services", POSTGRES, check_pods, "readinessProbe: &probe", "startupProbe: &probe"),
    ("services", POSTGRES, check_pods, "postgres:17.6", "postgres:latest"),
    ("services", MLFLOW, check_pods, "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
    (GPU, CLUSTER_FILE, check_pods, 'limits: {cpu: "4", memory: 8Gi}', 'limits: {cpu: "4"}'),
    (GPU, CLUSTER_FILE, check_pods, "-ray2.60.0", "-ray2.59.0"),
    (SMALL, "base/settings.yaml", check_references, "name: dskd-settings", "name: settings"),
    (SMALL, CLUSTER_FILE, check_references, "name: dskd-study, key: url", "name: dskd-study, key: uri"),
    (SMALL, CLUSTER_FILE, check_references, "secretName: dskd-ray-token", "secretName: ray-token"),
    (SMALL, CLUSTER_FILE, check_references, "serviceAccountName: dskd", "serviceAccountName: ray"),
    ("services", MLFLOW, check_references, "claimName: mlflow-users", "claimName: users"),
    ("services", MLFLOW, check_references, "targetPort: http", "targetPort: web"),
    ("services", "services/redis.yaml", check_references, "  selector: {app.kubernetes.io/name: redis}",
     "  selector: {app.kubernetes.io/name: reddis}"),
    (SMALL, CLUSTER_FILE, check_ray_rules, "mode: token", "mode: disabled"),
    (SMALL, CLUSTER_FILE, check_ray_rules, "minReplicas: 0", "minReplicas: 1"),
    (SMALL, CLUSTER_FILE, check_ray_rules, 'num-cpus: "0"', 'num-cpus: "2"'),
    (SMALL, CLUSTER_FILE, check_ray_rules, "dskd_driver\\", "driver\\"),
    (SMALL, CLUSTER_FILE, check_ray_rules, "redisAddress: redis:6379", "redisAddress: redis:6380"),
    (SMALL, CLUSTER_FILE, check_ray_rules, "automountServiceAccountToken: true", "automountServiceAccountToken: false"),
    (SMALL, CLUSTER_FILE, check_ray_rules, "secretKeyRef: {name: dskd-study", "configMapKeyRef: {name: dskd-study"),
    (SMALL, "base/network.yaml", check_ray_rules, "  ingress:\n    - from:", "  ingress:\n    - {}\n    - from:"),
    (JOB, "job/rayjob.yaml", check_ray_rules, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
    (QUEUED, f"{QUEUED}/kustomization.yaml", check_ray_rules, "minReplicas, value: 8", "minReplicas, value: 0"),
    (QUEUED, f"{QUEUED}/kustomization.yaml", check_ray_rules, "kueue.x-k8s.io~1queue-name", "queue-name"),
    (GPU, f"{GPU}/kustomization.yaml", check_ray_rules, "/spec/workerGroupSpecs/0/template/spec/tolerations",
     "/spec/headGroupSpec/template/spec/tolerations"),
    (GPU, f"{GPU}/kustomization.yaml", check_gpus, 'limits: {cpu: "8", memory: 16Gi, nvidia.com/gpu: "1"}',
     'limits: {cpu: "8", memory: 16Gi}'),
    (SERVE, "serve/rayservice.yaml", check_kuberay, "serveConfigV2:", "serveConfig:"),
    (SERVE, "serve/rayservice.yaml", check_serving, "tune.jobs.serve:build", "tune.serve:build"),
    (SERVE, "serve/rayservice.yaml", check_serving, "alias: champion", "aliases: champion"),
    (SERVE, "serve/rayservice.yaml", check_serving, "port: 8000", "port: 8080"),
    (SERVE, f"{SERVE}/kustomization.yaml", check_serving, "valueFrom: {secretKeyRef: {name: dskd-page, key: token}}",
     "value: swordfish"),
    (SERVE, f"{SERVE}/kustomization.yaml", check_references, "dskd-page, key: token", "dskd-page, key: key"),
    (QUEUED, f"{GPU}/kustomization.yaml", check_gpus, "key: nvidia.com/gpu, operator", "key: gpu, operator"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=lambda value: getattr(value, "__name__", value))
def test_file_has_no_problem(name: str, check: Check) -> None:
    assert check((CLUSTER / name).read_text()) == []


@pytest.mark.parametrize(("name", "check", "right", "wrong"), MISTAKES)
def test_mistake_is_found(name: str, check: Check, right: str, wrong: str) -> None:
    text = (CLUSTER / name).read_text()
    assert right in text
    assert check(text.replace(right, wrong, 1)) != []


@pytest.mark.parametrize(("overlay", "check"), OBJECT_CHECKS, ids=lambda value: getattr(value, "__name__", value))
def test_rendered_objects_have_no_problem(overlay: str, check: ObjectsCheck) -> None:
    assert check(_part(overlay)) == []


@pytest.mark.parametrize(("overlay", "name", "check", "right", "wrong"), OBJECT_MISTAKES)
def test_mistake_is_found_in_what_is_rendered(
    overlay: str, name: str, check: ObjectsCheck | None, right: str, wrong: str, tmp_path: Path
) -> None:
    shutil.copytree(CLUSTER / "kuberay", tmp_path / "kuberay")
    broken = tmp_path / "kuberay" / name
    text = broken.read_text()
    assert right in text
    broken.write_text(text.replace(right, wrong, 1))
    if check is None:
        with pytest.raises(subprocess.CalledProcessError):
            _rendered(tmp_path / "kuberay" / overlay)
    else:
        assert check(_rendered(tmp_path / "kuberay" / overlay)) != []


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("check", [check_kuberay, check_kubernetes])
def test_manifest_has_no_problem_unrendered(name: str, check: ObjectsCheck) -> None:
    """Where no Kustomize is installed these remain; what the overlays patch is then unchecked."""
    objects = _objects((CLUSTER / name).read_text())
    (cluster,) = _objects((CLUSTER / "kuberay" / CLUSTER_FILE).read_text())
    for thing in objects:
        if thing["kind"] in CLUSTER_OF:  # a component adds the cluster
            thing["spec"].setdefault(CLUSTER_OF[thing["kind"]], cluster["spec"])
    assert check(objects) == []


def test_every_check_is_shown_to_fail() -> None:
    assert {check for _, check in CHECKS} == {check for _, check, _, _ in MISTAKES}
    assert {check for _, check in OBJECT_CHECKS} == {check for _, _, check, _, _ in OBJECT_MISTAKES} - {None}
    assert {f"overlays/{folder.name}" for folder in (CLUSTER / "kuberay/overlays").iterdir()} < set(OVERLAYS)


def test_every_manifest_has_a_schema_check() -> None:
    checked = {name for name, check in CHECKS if check not in (check_versions, check_secrets)}
    outside = {name for name in FILES if name.endswith((".yaml", ".json")) and not name.startswith("kuberay/")}
    assert outside <= checked


def test_search_is_submitted_from_every_walk_through() -> None:
    commands = [entry for entry, _ in _commands((CLUSTER / "README.md").read_text())]
    assert commands.count("tune/search.py") == 3
    assert commands.count("tune/pull.py") == 3
    manifest = list(_commands((CLUSTER / "kuberay/job/rayjob.yaml").read_text()))
    assert [entry for entry, _ in manifest] == ["tune/search.py"]


def test_no_command_names_the_study_storage() -> None:
    """The search takes the URL, which holds a password, from its environment: job lists and logs never see it."""
    commands = (CLUSTER / "README.md").read_text() + (CLUSTER / "kuberay/job/rayjob.yaml").read_text()
    assert "--study-storage" not in commands


def _schema_problems(document: Any, schema: dict[str, Any]) -> list[str]:
    jsonschema = importlib.import_module("jsonschema")
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]


@functools.cache
def _served(path: Path) -> dict[str, Any]:
    return {version: _closed(schema) for version, schema in json.loads(path.read_text()).items()}


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


def _objects(text: str) -> list[Object]:
    return [document for document in yaml.safe_load_all(text) if document]


def _rendered(folder: Path) -> list[Object]:
    """What Kustomize makes of a folder; CalledProcessError where it refuses."""
    kustomize = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(kustomize[0]) is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*kustomize, folder], capture_output=True, text=True, timeout=120, check=True)
    return _objects(done.stdout)


@functools.cache
def _part(name: str) -> list[Object]:
    return _rendered(CLUSTER / "kuberay" / name)


def _key(thing: Object) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def _ray_cluster(objects: list[Object]) -> Object:
    """The RayCluster among the objects, or the one that KubeRay would make for the RayJob or RayService."""
    for thing in objects:
        if thing["kind"] == "RayCluster":
            return thing
    owner = next(thing for thing in objects if thing["kind"] in CLUSTER_OF)
    return {"apiVersion": owner["apiVersion"], "kind": "RayCluster", "metadata": owner["metadata"]} | {
        "spec": owner["spec"][CLUSTER_OF[owner["kind"]]]
    }


def _templates(thing: Object) -> list[Object]:
    """The pod templates of an object."""
    spec = thing.get("spec", {})
    if thing["kind"] == "RayCluster" or thing["kind"] in CLUSTER_OF:
        cluster = spec if thing["kind"] == "RayCluster" else spec.get(CLUSTER_OF[thing["kind"]])
        groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]) if cluster else ()
        return [group["template"] for group in groups]
    return [spec["template"]] if "template" in spec else []


def _plain(thing: Object) -> list[Object]:
    """An object of Kubernetes itself, or the Pods that KubeRay makes of one of its own."""
    if not thing["apiVersion"].startswith("ray.io/"):
        return [thing]
    return [{"apiVersion": "v1", "kind": "Pod", **template} for template in _templates(thing)]


def _pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for thing in objects:
        for index, template in enumerate(_templates(thing)):
            yield f"{thing['kind']} {thing['metadata']['name']} {index}", template["spec"]


def _named(thing: Any) -> Iterator[tuple[str, str, str]]:
    """(kind, name, key) of the ConfigMaps, Secrets, claims and accounts that something refers to."""
    if isinstance(thing, list):
        for item in thing:
            yield from _named(item)
    if not isinstance(thing, dict):
        return
    for field, value in thing.items():
        match field, value:
            case (("configMapRef" | "configMapKeyRef" | "configMap"), {"name": str(name)}):
                yield "ConfigMap", name, ""
            case (("secretRef" | "secretKeyRef"), {"name": str(name)}):
                yield "Secret", name, value.get("key", "")
            case "secretName", str(name):
                yield "Secret", name, "auth_token"
            case "claimName", str(name):
                yield "PersistentVolumeClaim", name, ""
            case "serviceAccountName", str(name):
                yield "ServiceAccount", name, ""
            case _:
                yield from _named(value)


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """The entries of tune/ that a manifest or a walk-through runs, each with the rest of its command."""
    if "kind: RayJob" in text:
        text = "\n".join(d["spec"]["entrypoint"] for d in _objects(text) if d["kind"] == "RayJob")
    for match in re.finditer(r"python (tune/\w+\.py)([^'`\n]*)", text.replace("\\\n", " ")):
        yield match[1], match[2]


def _flags(words: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", words))


@functools.cache
def _program(name: str) -> Any:
    """The command line of ray or mlflow, as the installed package defines it."""
    return importlib.import_module({"ray": "ray.scripts.scripts", "mlflow": "mlflow.cli"}[name]).cli


def _command(program: str, words: list[str]) -> Any:
    """The (sub)command that the words begin with, None where there is none."""
    found = _program(program)
    while words and hasattr(found, "commands"):
        found = found.commands.get(words[0])
        words = words[1:]
    return None if found is _program(program) or hasattr(found, "commands") else found


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
    return _flags(done.stdout)
