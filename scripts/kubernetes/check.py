"""Checks the manifests of examples/kubernetes: `check.py RULES FOLDER…`, from the top level of the repository, with `kubectl` on the PATH.

Standard output is one JSON array of the resources of Prometheus Operator, for check.mjs. Everything else goes to standard error.
"""

import json
import re
import subprocess
import sys

import kubernetes_validate
import yaml

# The oldest release that the schemas are compared with, and the newest one that is known.
VERSIONS = ["1.28.0", "1.37.0"]


def pod_specs(resource):
    """The specifications of pods in a resource. That of a Prometheus has the same fields."""
    if resource["kind"] == "Deployment":
        yield resource["spec"]["template"]["spec"]
    if resource["kind"] == "Prometheus":
        yield resource["spec"]


def violations(pod):
    """What the profile `restricted` of the Pod Security Standards forbids, each as a sentence."""
    both = pod.get("securityContext", {})
    for field in ["hostNetwork", "hostPID", "hostIPC"]:
        if pod.get(field):
            yield f"{field} is set"
    for volume in pod.get("volumes", []):
        allowed = {"name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
        if set(volume) - allowed:
            yield f"the volume {volume['name']} is of a forbidden type"
    containers = pod.get("initContainers", []) + pod.get("containers", [])
    # Prometheus Operator's own containers have only what the pod says.
    if both.get("runAsNonRoot") is not True or both.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "the pod may run as root, or has no seccomp profile"
    for container in containers:
        own = container.get("securityContext", {})
        name = container["name"]
        if own.get("runAsNonRoot", both.get("runAsNonRoot")) is not True:
            yield f"{name} may run as root"
        if own.get("runAsUser", both.get("runAsUser")) in (0, None):
            yield f"{name} has no user"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name} has capabilities"
        if own.get("seccompProfile", both.get("seccompProfile")) != {"type": "RuntimeDefault"}:
            yield f"{name} has no seccomp profile"
        # Beyond the profile, but said of these manifests.
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{name} can write to its root file system"
        for kind, what in [("requests", "cpu"), ("requests", "memory"), ("limits", "memory")]:
            if what not in container.get("resources", {}).get(kind, {}):
                yield f"{name} has no {kind} of {what}"
        if "livenessProbe" not in container:
            yield f"{name} has no liveness probe"


def unknown_variables(pod, known):
    """Variables that the program does not know: it would ignore them."""
    for container in pod.get("containers", []):
        for variable in container.get("env", []):
            if variable["name"] not in known:
                yield f"{container['name']}: there is no variable {variable['name']}"


def snake(value):
    """The names of a ScrapeConfig as those of Prometheus' configuration."""
    if isinstance(value, dict):
        names = {
            "fileSDConfigs": "file_sd_configs",
            "metricRelabelings": "metric_relabel_configs",
            "relabelings": "relabel_configs",
        }
        return {names.get(key, re.sub("[A-Z]", lambda c: "_" + c[0].lower(), key)): snake(item) for key, item in value.items()}
    return [snake(item) for item in value] if isinstance(value, list) else value


def comparable(job, proxies):
    """A job without what has to differ: where its list comes from, and what only sharding or only the stack needs."""
    kept = {key: value for key, value in job.items() if key not in ("job_name", "file_sd_configs", "http_s_d_configs")}
    if kept.get("proxy_url") in proxies:
        kept["proxy_url"] = "the tunnel"
    rules = kept.get("relabel_configs", [])
    # The operator names the job itself. The rule that takes the names of the stack's jobs from a device has to be there.
    own = [("__tmp_hash", None), ("job", "balena")]
    kept["relabel_configs"] = [rule for rule in rules if (rule.get("target_label"), rule.get("replacement")) not in own]
    return kept


def main(rules, folders):
    with open(rules) as file:
        custom = list(yaml.safe_load_all(file))
    errors = []
    with open("src/config/options.rs") as file:
        known = set(re.findall(r'"([A-Z][A-Z_]+)"', file.read()))
    with open("prometheus.yml") as file:
        jobs = yaml.safe_load(file)["scrape_configs"]
    proxies = {"http://tunnel:9798", "http://127.0.0.1:9798", "http://baletheus:9798"}
    stack = {job["job_name"]: comparable(job, proxies) for job in jobs}
    for folder in folders:
        text = subprocess.run(["kubectl", "kustomize", folder], check=True, stdout=subprocess.PIPE, text=True).stdout
        resources = list(yaml.safe_load_all(text))
        found = {}
        for resource in resources:
            name = f"{folder}: {resource['kind']} {resource['metadata']['name']}"
            print(name, file=sys.stderr)
            if resource["apiVersion"].startswith("monitoring.coreos.com/"):
                custom.append(resource)
            else:
                for version in VERSIONS:
                    try:
                        kubernetes_validate.validate(resource, version, strict=True)
                    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                        errors.append(f"{name}: Kubernetes {version}: {error.message}")
            for pod in pod_specs(resource):
                errors += [f"{name}: {error}" for error in violations(pod)]
                errors += [f"{name}: {error}" for error in unknown_variables(pod, known)]
            if resource["kind"] == "ScrapeConfig":
                found[resource["metadata"]["name"]] = snake({k: v for k, v in resource["spec"].items() if k != "jobName"})
                # The only guard of prometheus.yml for which a ScrapeConfig has no field; docs/kubernetes.md says what follows.
                found[resource["metadata"]["name"]].setdefault("follow_redirects", False)
            if resource["kind"] == "ConfigMap" and "prometheus.yml" in resource["data"]:
                config = yaml.safe_load(resource["data"]["prometheus.yml"])
                found |= {job["job_name"]: job for job in config["scrape_configs"]}
        for job in ["balena", "balena-direct"]:
            if comparable(found.get(job, {}), proxies) != stack[job]:
                errors.append(f"{folder}: the job {job} differs from that of prometheus.yml: {found.get(job)}")
    if errors:
        sys.exit("\n".join(errors))
    json.dump(custom, sys.stdout)


main(sys.argv[1], sys.argv[2:])
