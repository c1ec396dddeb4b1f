#!/usr/bin/env python3
"""Checks rendered manifests: `kubectl kustomize base | validate.py NAME`.

Every document is held to its schema without unknown fields (Kubernetes' own from the package `kubernetes-validate`,
JobSet's from `jobset.schema.json`), and the set to what no schema knows: that its parts fit together.
"""

import json
import math
import re
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource

KUBERNETES = "1.31"  # the oldest version that the manifests are for
SECRETS = {"mesh-tls-coordinator", "mesh-tls-worker", "mesh-tls-client", "mesh-s3"}  # made by hand, see docs/deploy.md


def jobset_validator():
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    definitions = Resource.from_contents(json.loads((schemas / "_definitions.json").read_text()))
    schema = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=definitions @ Registry())


def schema_mistakes(document):
    if document.get("kind") == "JobSet":
        for e in jobset_validator().iter_errors(document):
            yield f"{e.json_path}: {e.message}"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as e:
        yield f"{e.json_path}: {e.message}"
    except kubernetes_validate.SchemaNotFoundError as e:
        yield e.message


def pod_mistakes(name, pod, there):
    """One pod: what it mounts is there, and it asks for no rights."""
    volumes = {v["name"]: v for v in pod.get("volumes", [])}
    for volume in volumes.values():
        wanted = (
            ("ConfigMap", volume.get("configMap", {}).get("name")),
            ("Secret", volume.get("secret", {}).get("secretName")),
            ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
        )
        for kind, wants in wanted:
            if wants and (kind, wants) not in there:
                yield f"{name}: there is no {kind} `{wants}`"
    user = pod.get("securityContext", {})
    if not (user.get("runAsNonRoot") and user.get("runAsUser") and "fsGroup" in user):
        yield f"{name}: runs as no certain user"
    if user.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: without seccomp's default profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield f"{name}: gets a token of the cluster, and needs none"
    for container in pod["containers"] + pod.get("initContainers", []):
        at = f"{name}/{container['name']}"
        rights = container.get("securityContext", {})
        if rights.get("allowPrivilegeEscalation") is not False or rights.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{at}: keeps rights that it does not need"
        if not rights.get("readOnlyRootFilesystem"):
            yield f"{at}: can write to its root file system"
        if not {"requests", "limits"} <= container.get("resources", {}).keys():
            yield f"{at}: no resources"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{at}: mounts `{mount['name']}`, which is no volume of its pod"
        for source in container.get("envFrom", []):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source and (kind, source[field]["name"]) not in there:
                    yield f"{at}: there is no {kind} `{source[field]['name']}`"


def run_mistakes(jobset, config):
    """The run: devices, grace, exit codes and names agree."""
    jobs = {j["name"]: j["template"]["spec"] for j in jobset["spec"]["replicatedJobs"]}
    coordinator, worker, program = (tomllib.loads(config[f"{n}.toml"]) for n in ("coordinator", "worker", "unet3d"))
    crew = jobs["worker"]
    if crew["parallelism"] != crew["completions"]:
        yield f"{crew['parallelism']} workers at a time of {crew['completions']}: all have to be there at once"
    devices = crew["parallelism"] * int(worker["devices"].removeprefix("cpu:"))
    mesh = math.prod(int(n) for n in re.findall(r"=(\d+)", program["mesh"]))
    if devices != mesh:
        yield f"unet3d.toml: the mesh {program['mesh']} needs {mesh} devices, and the workers have {devices}"
    for name, options in (("coordinator", coordinator), ("worker", worker)):
        if jobs[name]["template"]["spec"]["terminationGracePeriodSeconds"] <= options["grace"]:
            yield f"{name}: killed before its grace is over: raise terminationGracePeriodSeconds"
    host = f"{jobset['metadata']['name']}-coordinator-0-0.{jobset['spec']['network']['subdomain']}"
    address = f"{host}:{coordinator['listen'].rsplit(':', 1)[1]}"
    for at, text in (("worker.toml", worker["join"]), ("the trainer", json.dumps(jobs["trainer"]))):
        if address not in text:
            yield f"{at}: does not name the coordinator's address {address}"
    for name, job in jobs.items():
        codes = {}
        for rule in job["podFailurePolicy"]["rules"]:
            values = rule.get("onExitCodes", {}).get("values", [])
            if values != sorted(set(values)):
                yield f"{name}: exit codes {values} are not in order, which Kubernetes refuses"
            codes |= dict.fromkeys(values, rule["action"])
        if codes != {75: "Ignore", 2: "FailJob", 3: "FailJob", 4: "FailJob"}:
            yield f"{name}: exit codes are taken as {codes}"


def mistakes(documents):
    there = {(d["kind"], d["metadata"]["name"]) for d in documents} | {("Secret", s) for s in SECRETS}
    found = []
    for d in documents:
        found += [f"{d['kind']} {d['metadata']['name']}: {text}" for text in schema_mistakes(d)]
    if found:
        return found  # what follows relies on the shape
    config = next(d["data"] for d in documents if (d["kind"], d["metadata"]["name"]) == ("ConfigMap", "mesh-config"))
    for jobset in (d for d in documents if d["kind"] == "JobSet"):
        for job in jobset["spec"]["replicatedJobs"]:
            found += pod_mistakes(job["name"], job["template"]["spec"]["template"]["spec"], there)
        found += run_mistakes(jobset, config)
    return found


def main():
    documents = [d for d in yaml.safe_load_all(sys.stdin) if d]
    if not any(d["kind"] == "JobSet" for d in documents):
        sys.exit(f"{sys.argv[1]}: no JobSet was rendered")
    found = mistakes(documents)
    for text in found:
        print(f"{sys.argv[1]}: {text}", file=sys.stderr)
    if found:
        sys.exit(1)
    print(f"{sys.argv[1]}: {len(documents)} documents are good")


if __name__ == "__main__":
    main()
