"""`lab`: simulated pods behind the proxy, in a shell of its own, of which nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from userspace_proxy.lab import shell
from userspace_proxy.lab.cluster import Cluster
from userspace_proxy.lab.words import Words

LAB = [sys.executable, "-P", "-m", "userspace_proxy", "lab"]
WEB = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: nginx, ports: [{containerPort: 8080, name: http}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
"""


@pytest.fixture
def web(tmp_path: Path) -> Path:
    path = tmp_path / "web.yaml"
    path.write_text(WEB)
    return path


def lab(script: str, *arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run *script* in a lab, as this user."""
    command = [*LAB, *map(str, arguments), "--", "bash", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def answers(lines: Sequence[str]) -> Counter[str]:
    """Return how often each pod answered, or "failed"."""
    return Counter(line.split()[0] for line in lines)


ASK = "ask() { for i in $(seq $1); do curl -sm3 http://web || echo failed; done; echo --; }\n"


def test_a_service_is_reached_by_name_and_turns_through_the_replicas_of_its_deployment(web: Path) -> None:
    done = lab(f"{ASK} ask 6; get pods", web)

    assert done.returncode == 0, done.stderr
    turns, _, pods = done.stdout.partition("--\n")
    seen = answers(turns.splitlines())
    assert sorted(seen.values()) == [2, 2, 2]
    assert set(seen) == {line.split()[0] for line in pods.splitlines()[1:]}
    assert all(re.search(r"10\.244\.1\.\d+:8080 client=10\.244\.0\.1", line) for line in turns.splitlines())


def test_the_exit_code_of_a_command_is_that_of_the_lab() -> None:
    assert lab("exit 7").returncode == 7
    assert lab("kill -9 $$").returncode == 137


def test_nothing_of_the_machine_is_reached(web: Path) -> None:
    mounted = Path("/proc/self/mountinfo").read_text()
    resolver = Path("/etc/resolv.conf").read_bytes()

    done = lab("ls /sys/class/net; ip -br link; ls /run; cat /etc/resolv.conf", web)

    assert "nameserver 10.96.0.10" in done.stdout
    assert Path("/etc/resolv.conf").read_bytes() == resolver
    assert Path("/proc/self/mountinfo").read_text() == mounted
    assert {line.split("@")[0] for line in done.stdout.splitlines() if "@" in line} == {"eth0"}


def test_scaling_a_rolling_restart_and_an_unready_pod_lose_no_request(web: Path) -> None:
    script = f"""{ASK}
    scale web 4; ask 8
    kubectl rollout restart deployment/web & for i in $(seq 40); do curl -sm3 http://web || echo failed; done; wait
    echo --; get pods
    unready web; ask 6; ready web; ask 8
    kubectl scale deployment web --replicas=1; ask 3; get deployments
    """
    done = lab(script, web, timeout_s=90)

    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    scaled, _, without, again, one, _ = done.stdout.split("--\n")
    assert sorted(answers(scaled.splitlines()[1:]).values()) == [2, 2, 2, 2]
    assert len(answers(without.splitlines()[-6:])) == 3
    assert len(answers(again.splitlines()[1:])) == 4
    assert len(answers(one.splitlines()[1:])) == 1
    assert done.stdout.endswith("web    1/1\n")


@pytest.mark.parametrize(("mode", "fails"), [("userspace", False), ("nftables", True)])
def test_a_dead_pod_refuses_and_only_a_kernel_mode_shows_it_to_clients(web: Path, mode: str, fails: bool) -> None:
    done = lab(f"{ASK} kill-pod web; ask 30; unready web; ask 6", web, "--proxy-mode", mode)

    dead, told, _ = done.stdout.split("--\n")
    assert ("failed" in answers(dead.splitlines()[1:])) is fails
    assert "failed" not in told or mode == "userspace", done.stdout


def test_words_that_inspect_the_node_work_on_the_client(web: Path) -> None:
    done = lab(
        "get services; why web; describe service web; nft list ruleset; render --explain; trace web; mode iptables;"
        "iptables-save; cat /run/lab/mode",
        web,
    )

    assert done.stderr == ""
    assert done.returncode == 0
    for found in ("round robin", "Selector:", "table inet userspace_proxy", "192.168.50.2", "KUBE-SVC-"):
        assert found in done.stdout
    assert done.stdout.endswith("iptables\n")


def test_an_edited_manifest_takes_effect_and_one_that_is_deleted_leaves_nothing(web: Path) -> None:
    done = lab(
        f"sed -i 's/replicas: 3/replicas: 2/' {web}; until get deployments | grep -q 2/2; do sleep 0.1; done;"
        f"delete -f {web}; until get pods | grep -q 'No Pods'; do sleep 0.1; done; get services; apply -f {web};"
        "curl -s http://web",
        web,
    )

    assert done.returncode == 0, done.stderr
    assert "No services found" in done.stderr
    assert re.search(r"^web-\S+ 10\.244\.1\.", done.stdout, re.MULTILINE)


def test_a_manifest_with_a_mistake_is_named_and_its_last_good_version_stays(web: Path, tmp_path: Path) -> None:
    good, broken = tmp_path / "good.yaml", tmp_path / "broken.yaml"
    good.write_text(WEB)
    broken.write_text(WEB.replace("{labels: {app: web}}", "{labels: {app: web}"))
    done = lab(
        f"cp {broken} {web}; until get pods | grep -q warning; do sleep 0.1; done; get deployments;"
        f"apply -f {broken}; echo $?; cp {good} {web}; until ! get pods | grep warning >/dev/null; do sleep 0.1; done;"
        "get deployments",
        web,
    )

    assert done.returncode == 0, done.stderr
    assert re.search(r"^web +3/3\nwarning: .*web\.yaml:\d+: .*\n1\nNAME.*\nweb +3/3\n", done.stdout, re.MULTILINE)
    assert re.search(r"apply: .*broken\.yaml:\d+: ", done.stderr)


@pytest.mark.parametrize(
    "container",
    ["{name: web, ports: [80]}", "{name: web, ports: [{containerPort: http}]}", "{ports: [{containerPort: 70000}]}"],
)
def test_a_pod_that_cannot_be_simulated_is_named_and_others_serve(tmp_path: Path, container: str) -> None:
    path = tmp_path / "client.yaml"
    path.write_text(
        f"kind: Pod\napiVersion: v1\nmetadata: {{name: client}}\nspec: {{containers: [{container}]}}\n---\n{WEB}"
    )

    done = lab("curl -s http://web; get pods; kubectl exec deploy/web -- echo in a pod", path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("in a pod\n")
    assert "Traceback" not in done.stderr
    assert "pod default/client serves nothing: " in done.stderr
    assert re.match(r"web-\S+ 10\.244\.1\.", done.stdout)
    assert re.search(r"^client ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["../../../tmp/x", "a/b", "-x", "A", f"{'x' * 60}." * 4 + "x"])
@pytest.mark.parametrize("kind", ["Pod", "Deployment"])
def test_a_pod_with_a_name_that_no_pod_can_have_is_named_and_others_serve(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "names.yaml"
    spec = {"Pod": "{containers: []}", "Deployment": "{template: {spec: {containers: []}}}"}[kind]
    path.write_text(f"kind: {kind}\napiVersion: v1\nmetadata: {{name: '{name}'}}\nspec: {spec}\n---\n{WEB}")

    done = lab("curl -s http://web", path)

    assert done.returncode == 0, done.stderr
    assert re.match(r"web-\S+ 10\.244\.1\.", done.stdout)
    assert f"userspace-proxy: pod default/{name[:20]}" in done.stderr
    assert " is not simulated: its name is not valid\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_words_read_options_as_kubectl_does(web: Path) -> None:
    asked = (
        *("kubectl -n default exec deploy/web -- echo a", "kubectl exec deploy/web -- head -n 1 /etc/passwd"),
        *(
            "get -n default services",
            "get -n default -o wide svc/web",
            "get -A svc",
            "delete deploy wbe 2>&1",
            "apply -f a -f b 2>&1",
        ),
        *("scale web other --replicas=2 2>&1", "delete deploy/web svc/web", "get -n default services 2>&1"),
    )
    done = lab("; echo ==; ".join(asked), web)

    in_pod, head, services, wide, everywhere, typo, twice, two, deleted, none = done.stdout.split("==\n")
    assert in_pod == "a\n"
    assert len(head.splitlines()) == 1
    assert re.search(r"^web +ClusterIP", services, re.MULTILINE)
    assert re.search(r"^web +ClusterIP", wide, re.MULTILINE)
    assert re.search(r"^default +web +ClusterIP", everywhere, re.MULTILINE)
    assert typo == "delete: there is no Deployment default/wbe\n"
    assert twice == "apply: give one -f; a folder stands for all its files\n"
    assert two == "scale: usage: scale NAME N\n"
    assert deleted == "deployment/web deleted\nservice/web deleted\n"
    assert "No services found" in none


def test_a_pod_that_hangs_or_is_silent_answers_nothing_until_it_is_ready(web: Path) -> None:
    done = lab(
        "scale web 1; for how in --hang --silent; do kill-pod $how web; curl -sm1 http://web; echo $?; ready web;"
        "curl -s http://web; done",
        web,
    )

    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes[0] == "28"
    assert codes[1] in ("7", "28", "56")
    assert len(re.findall("client=", done.stdout)) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_labs_that_are_killed_at_random_points_leave_nothing(web: Path, how: signal.Signals, tmp_path: Path) -> None:
    mark = f"LAB_OF_A_TEST={tmp_path}"
    before = {*Path("/run/netns").iterdir()} if Path("/run/netns").exists() else set()
    labs = [
        subprocess.Popen(
            [*LAB, str(web), "--", "sleep", "60"],
            env={**os.environ, **dict([mark.split("=", 1)])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    for process in labs:
        time.sleep(random.uniform(0.05, 1.5))
        process.send_signal(how)
        process.wait(20)

    deadline = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert ({*Path("/run/netns").iterdir()} if Path("/run/netns").exists() else set()) == before


def marked(mark: str) -> list[int]:
    """Return the processes whose environment has *mark*."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_pod_is_a_client_too_and_the_pod_that_answers_sees_it_in_a_kernel_mode(web: Path) -> None:
    done = lab(
        "set -- $(get pods | awk 'NR == 2 { print $1, $5 }'); ip netns exec $1 curl -s http://web; mode nftables;"
        "for i in $(seq 8); do ip netns exec $1 curl -sm3 http://web || echo failed; done; echo $2",
        web,
    )

    *lines, ip = done.stdout.splitlines()
    assert re.search(r"client=10\.244\.0\.1$", lines[0])
    assert all(re.search(rf"client=({re.escape(ip)}|10\.244\.0\.1)$", line) for line in lines[2:]), done.stdout


def test_a_pod_answers_udp_with_what_it_saw(tmp_path: Path) -> None:
    (tmp_path / "udp.yaml").write_text(
        WEB.replace("containerPort: 8080, name: http", "containerPort: 53, name: http, protocol: UDP").replace(
            "{port: 80,", "{port: 53, protocol: UDP,"
        )
    )

    done = lab("exec 3<>/dev/udp/web/53; echo hello >&3; timeout 5 head -n 1 <&3", tmp_path / "udp.yaml")

    assert re.match(r"web-\S+ 10\.244\.1\.\d+:53 client=10\.244\.0\.1$", done.stdout), done.stderr


def test_the_prompt_of_the_shell_shows_the_mode_and_ctrl_c_ends_only_the_program_in_front() -> None:
    terminal, theirs = pty.openpty()
    shell = subprocess.Popen(["setsid", "--ctty", *LAB], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)

    def read_until(text: bytes) -> None:
        seen = b""
        deadline = time.monotonic() + 30
        while text not in seen:
            assert select.select([terminal], [], [], max(deadline - time.monotonic(), 0))[0], seen
            seen += os.read(terminal, 4096)

    try:
        read_until(b"[lab userspace]")
        os.write(terminal, b"sh -c 'echo begun; exec sleep 60'\n")
        read_until(b"begun\r\n")
        os.write(terminal, b"\x03")
        read_until(b"[lab userspace]")
        os.write(terminal, b"mode nftables\n")
        read_until(b"[lab nftables]")
        os.write(terminal, b"exit 3\n")
        read_until(b"exit\r\n")
        assert shell.wait(20) == 3
    finally:
        shell.kill()
        shell.wait(20)
        os.close(terminal)


def test_words_of_a_tutorial_run_in_a_pod_forward_a_port_and_look_up_names(web: Path) -> None:
    done = lab(
        "kubectl exec -it deploy/web -- curl -s http://web; lookup web.default.svc.cluster.local;"
        "kubectl port-forward svc/web 8888:80 >/dev/null & until curl -sf http://localhost:8888; do sleep 0.1; done;"
        "mode none; cat /run/lab/mode; curl -sm1 http://web; echo $?; kubectl exec nope -- true",
        web,
    )

    assert done.returncode == 1
    assert "there is no such pod default/nope" in done.stderr
    assert re.search(r"^10\.96\.\d+\.\d+$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^web-\S+ 10\.244\.1\.\d:8080 client=", done.stdout, re.MULTILINE)) == 2
    assert re.search(r"^none\n(28|7)$", done.stdout, re.MULTILINE)


def test_commands_of_a_tutorial_answer_as_kubectl_does_or_say_what_the_lab_has(web: Path) -> None:
    asked = (
        *("kubectl get pods -l app=web -o wide", "kubectl get pods -l app=other", "kubectl get deploy,svc"),
        *(
            "kubectl -n default get endpointslices -l kubernetes.io/service-name=web",
            "kubectl rollout status deploy/web",
        ),
        *("kubectl scale deployment web --replicas 2", "kubectl get nodes 2>&1", "kubectl edit svc web 2>&1"),
        *("kubectl describe pod $(kubectl get pods | awk 'NR == 2 { print $1 }')", "kubectl delete deploy web"),
        f"sed 's/name: web/name: piped/' {web} | kubectl apply -f -; curl -s http://piped",
        *("kubectl get svc/piped", "kubectl describe svc/piped", "kubectl get deploy other", "scale --replicas=3 2>&1"),
    )
    done = lab("; echo ==; ".join(asked), web)

    pods, other, both, endpoints, status, scaled, nodes, edit, pod, deleted, piped, *named = done.stdout.split("==\n")
    assert len(pods.splitlines()) == 4
    assert other == "No Pods found in namespace default.\n"
    assert re.search(r"web +3/3\nNAME.*\nweb +ClusterIP", both)
    assert len(endpoints.splitlines()) == 4
    assert "successfully rolled out" in status
    assert scaled == "web scaled to 2\n"
    assert "the lab has no nodes; it has pods" in nodes
    assert "docs/how-to/lab.md" in edit
    assert '"podIP": "10.244.1.' in pod
    assert deleted == "deployment/web deleted\n"
    assert re.search(r"^piped-\S+ 10\.244\.1\.", piped, re.MULTILINE)
    assert [text.splitlines()[-1].split()[0] for text in named[:1]] == ["piped"]
    assert re.match(r"Name: +piped\n", named[1])
    assert named[2:] == ["No Deployments found in namespace default.\n", "scale: usage: scale NAME N\n"]


def test_describe_takes_the_beginning_of_a_name_or_says_that_there_is_none(web: Path) -> None:
    asked = (
        *("describe pod web", "describe pod/web- | grep -c podIP", "describe deploy we", "describe endpoints web"),
        *("describe pod other 2>&1; echo $?", "kubectl describe deploy/other 2>&1; echo $?", "get pods other -o yaml"),
    )
    done = lab("; echo ==; ".join(asked), web)

    pods, counted, deployment, endpoints, no_pod, no_deployment, none = done.stdout.split("==\n")
    assert pods.count('"kind": "Pod"') == 3
    assert int(counted) == 6  # podIP and podIPs of each
    assert re.search(r"^web +3/3$", deployment, re.MULTILINE)
    assert len(re.findall(r"10\.244\.1\.\d+:8080", endpoints)) == 3
    assert no_pod == "get: there is no Pod default/other\n1\n"
    assert no_deployment == "get: there is no Deployment default/other\n1\n"
    assert none == "No Pods found in namespace default.\n"


def test_describe_prefers_the_object_that_has_the_name_itself(tmp_path: Path) -> None:
    for name in ("web", "web-admin", "api-1"):
        spec = {"replicas": 1, "template": {"spec": {"containers": [{"name": "a", "image": "nginx"}]}}}
        manifest = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}
        (tmp_path / f"{name}.json").write_text(json.dumps(manifest))

    asked = ("describe deploy web", "describe deploy we", "describe deploy web api")
    shown = lab("; echo ==; ".join(asked), tmp_path).stdout.split("==\n")

    assert [sorted(re.findall(r"^(\S+) +\d+/\d+$", each, re.MULTILINE)) for each in shown] == [
        ["web"],
        ["web", "web-admin"],
        ["api-1", "web"],
    ]


async def test_a_word_that_fails_by_a_fault_of_the_lab_is_answered(tmp_path: Path) -> None:
    async def set_mode(_: str) -> None:
        raise RuntimeError("a fault")

    words = Words(cast("Cluster", SimpleNamespace(problem="")), set_mode)
    async with asyncio.timeout(10), await asyncio.start_unix_server(partial(shell._obey, words), tmp_path / "s"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        with contextlib.closing(writer):
            writer.write(json.dumps(["/", "mode", "userspace"]).encode() + b"\n")
            code, text = json.loads(await reader.readline())

    assert (code, text) == (1, "mode: the lab has failed; its traceback says where")
