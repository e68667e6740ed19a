"""Rules of security and of good order that no schema knows. Each returns complaints; none is a clean set."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests import Object, containers, named, pods, ray_cluster

_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"AKIA[0-9A-Z]{12}|://[^/\s:@]+:[^/\s@]+@|-----BEGIN|aws_secret_access_key", re.IGNORECASE)
_METADATA_SERVICE = "169.254.169.254/32"


def security(found: list[Object]) -> list[str]:
    """All rules over all objects."""
    rules = (pod_rules, container_rules, token_rules, secret_rules, network_rules, access_rules, ray_rules)
    return [complaint for rule in rules for complaint in rule(found)]


def pod_rules(found: list[Object]) -> Iterator[str]:
    """Nothing runs as root, nothing shares the host's namespaces or disk, scratch space is bounded."""
    for thing in found:
        for path, _, pod in pods(thing):
            where = f"{named(thing)}{path}"
            context = pod.get("securityContext", {})
            if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
                yield f"{where}: may run as root"
            if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
                yield f"{where}: no seccomp profile"
            for share in ("hostNetwork", "hostPID", "hostIPC"):
                if pod.get(share):
                    yield f"{where}: shares {share} with its node"
            for volume in pod.get("volumes", []):
                if "hostPath" in volume:
                    yield f"{where}: mounts its node's disk"
                if "emptyDir" in volume and not volume["emptyDir"].get("sizeLimit"):
                    yield f"{where}: volume {volume['name']} has no sizeLimit"


def container_rules(found: list[Object]) -> Iterator[str]:
    """Least rights, a root that is read only with somewhere else to write, sizes of everything."""
    for thing in found:
        for path, _, pod in pods(thing):
            for container in containers(pod):
                where = f"{named(thing)}{path} container {container['name']}"
                context = container.get("securityContext", {})
                if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                    yield f"{where}: may gain privileges"
                if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
                    yield f"{where}: may run as root"
                if context.get("capabilities", {}).get("drop") != ["ALL"] or context["capabilities"].get("add"):
                    yield f"{where}: keeps capabilities"
                if context.get("readOnlyRootFilesystem") is not True:
                    yield f"{where}: can write its image"
                if not any(mount["mountPath"] == "/tmp" for mount in container.get("volumeMounts", [])):
                    yield f"{where}: has nowhere to write, /tmp is not mounted"
                resources = container.get("resources", {})
                for kind in ("requests", "limits"):
                    for name in ("cpu", "memory", "ephemeral-storage"):
                        if name not in resources.get(kind, {}):
                            yield f"{where}: {kind} no {name}"
                if any("hostPort" in port for port in container.get("ports", [])):
                    yield f"{where}: takes a port of its node"


def token_rules(found: list[Object]) -> Iterator[str]:
    """Tokens for the API server only where an autoscaler needs one; nobody uses the default account."""
    for thing in found:
        if thing["kind"] == "ServiceAccount" and thing.get("automountServiceAccountToken") is not False:
            yield f"{named(thing)}: gives its token to every pod"
        cluster = ray_cluster(thing)
        for path, owner, pod in pods(thing):
            scales = cluster and cluster.get("enableInTreeAutoscaling") and owner is cluster["headGroupSpec"]
            if pod.get("automountServiceAccountToken") is not bool(scales):
                yield (
                    f"{named(thing)}{path}: mounts a service account token"
                    if not scales
                    else (f"{named(thing)}{path}: its autoscaler has no token")
                )
            if pod.get("serviceAccountName", "default") == "default":
                yield f"{named(thing)}{path}: uses the default service account"


def secret_rules(found: list[Object]) -> Iterator[str]:
    """No secret's value is rendered, under whatever name."""
    for thing in found:
        if thing["kind"] == "Secret":
            yield f"{named(thing)}: a secret is rendered"
        for key, value in (thing.get("data") or {}).items() if thing["kind"] == "ConfigMap" else ():
            if _SECRET_NAME.search(key) or _SECRET_VALUE.search(str(value)):
                yield f"{named(thing)}: {key} holds a secret"
        for path, _, pod in pods(thing):
            for container in containers(pod):
                for entry in container.get("env", []):
                    value = entry.get("value")
                    if value and (_SECRET_NAME.search(entry["name"]) or _SECRET_VALUE.search(value)):
                        yield f"{named(thing)}{path}: {entry['name']} holds a secret"
                for word in (*container.get("command", ()), *container.get("args", ())):
                    if _SECRET_VALUE.search(word):
                        yield f"{named(thing)}{path}: a command holds a secret"


def network_rules(found: list[Object]) -> Iterator[str]:
    """Every namespace is closed by default, and what is opened says to whom."""
    policies = [thing for thing in found if thing["kind"] == "NetworkPolicy"]
    closed = {
        policy["metadata"]["namespace"]
        for policy in policies
        if policy["spec"]["podSelector"] == {}
        and set(policy["spec"].get("policyTypes", ())) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
    }
    used = {thing["metadata"]["namespace"] for thing in found if "namespace" in thing["metadata"]}
    used |= {thing["metadata"]["name"] for thing in found if thing["kind"] == "Namespace"}
    for namespace in sorted(used - closed):
        yield f"namespace {namespace}: no default-deny"
    for namespace in sorted(used - {t["metadata"]["name"] for t in found if t["kind"] == "Namespace"}):
        yield f"namespace {namespace}: used and not made"
    for policy in policies:
        spec = policy["spec"]
        for rule in spec.get("ingress") or ():
            if not rule.get("from"):
                yield f"{named(policy)}: lets anybody in"
            if any(peer == {"namespaceSelector": {}} for peer in rule.get("from", ())):
                yield f"{named(policy)}: lets every namespace in"
        for rule in spec.get("egress") or ():
            if not rule.get("to"):
                yield f"{named(policy)}: lets everything out"
            for peer in rule.get("to", ()):
                block = peer.get("ipBlock", {})
                if block.get("cidr", "").endswith("/0") and (
                    _METADATA_SERVICE not in block.get("except", ()) or not rule.get("ports")
                ):
                    yield f"{named(policy)}: opens the metadata service or every port"
    for thing in found:
        if thing["kind"] == "Service" and thing["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"{named(thing)}: is reachable from outside the cluster"
        enforced = thing["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if thing["kind"] == "Namespace" and enforced not in ("baseline", "restricted"):
            yield f"{named(thing)}: enforces no Pod Security"


def access_rules(found: list[Object]) -> Iterator[str]:
    """Roles name what they allow, and nothing that leads to secrets or into pods."""
    for thing in found:
        if thing["kind"] in ("ClusterRole", "ClusterRoleBinding"):
            yield f"{named(thing)}: rights beyond the namespace"
        for rule in thing.get("rules", ()) if thing["kind"] == "Role" else ():
            words = {*rule.get("apiGroups", ()), *rule.get("resources", ()), *rule.get("verbs", ())}
            for word in sorted(words & {"*", "secrets", "pods/exec", "pods/attach", "roles", "rolebindings", "bind"}):
                yield f"{named(thing)}: allows {word}"


def ray_rules(found: list[Object]) -> Iterator[str]:
    """Ray asks for its token; a job's entrypoint is one plain command; jobs clean up after themselves."""
    for thing in found:
        cluster = ray_cluster(thing)
        if cluster and cluster.get("authOptions") != {"mode": "token"}:
            yield f"{named(thing)}: its dashboard asks for no token"
        if cluster and cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{named(thing)}: ranks may run on its head"
        if thing["kind"] != "RayJob":
            continue
        spec = thing["spec"]
        if re.search(r"[$&|;<>()`*?'\"\\\n]", spec["entrypoint"]):
            yield f"{named(thing)}: the submitter's shell would change its entrypoint"
        if not spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" not in spec:
            yield f"{named(thing)}: leaves its cluster running"
        if not spec.get("preRunningDeadlineSeconds") or not spec.get("backoffLimit"):
            yield f"{named(thing)}: waits for ever, or gives up at once"


def images(found: list[Object], *, by_digest: bool) -> Iterator[str]:
    """Every image has a tag, in production a digest."""
    for thing in found:
        for path, _, pod in pods(thing):
            for container in containers(pod):
                image = container["image"]
                if by_digest and not re.search(r"@sha256:[0-9a-f]{64}$", image):
                    yield f"{named(thing)}{path}: {image} is not named by digest"
                if not by_digest and (":" not in image.rpartition("/")[2] or image.endswith(":latest")):
                    yield f"{named(thing)}{path}: {image} has no tag"
