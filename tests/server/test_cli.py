"""The command line: help everywhere, one line for an error, stable exit codes, JSON where asked for, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister.cli import main
from cloister_flower.bundle import build_bundle
from cloister_model.base import find_base
from cloister_server.coordinator import init, open_coordinator
from cloister_server.federation import read_federation
from cloister_server.store import Commit, Store
from cloister_server.tables import RoundClient, Run
from cloister_shared.installed import code_version
from cloister_shared.processes import free_port
from cloister_shared.signing import SigningKey
from cloister_shared.vectors import Schema, to_safetensors

from support.registry import a_model, planned
from support.server_world import make_desk, start_store, write_federation
from support.tampering import edit

COMMANDS = (
    "",
    "run",
    "demo",
    "audit",
    "audit attack",
    "site",
    "site enrol",
    "site up",
    "site status",
    "coordinator",
    "coordinator init",
    "coordinator admit",
    "coordinator invite",
    "coordinator revoke",
    "coordinator up",
    "attack",
    "site peer",
    "site registered",
    "site data add",
    "rounds",
    "rounds list",
    "rounds show",
    "rounds export",
    "rounds import",
    "rounds promote",
    "rounds rollback",
    "rounds protect",
    "rounds aliases",
    "rounds diff",
    "rounds hold",
    "rounds release",
    "rounds holds",
    "rounds give-up",
    "registry",
    "registry fsck",
    "registry gc",
    "registry migrate",
    "coordinator operator-key",
    "coordinator operator-sign",
    "audit fetch",
    "site rounds",
    "site pull",
    "doctor",
)


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """Its one JSON line."""
        (line,) = self.out.splitlines()
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def one_error(self, code: int, *words: str) -> None:
        """Checks that it is one error line, an exit code, and no traceback."""
        assert self.code == code, self
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert [line[:7] for line in lines] == ["error: "], self.err
        assert "Traceback" not in self.out + self.err
        for word in words:
            assert word in lines[0], lines[0]


def cloister(*arguments: str | Path, cwd: Path) -> Said:
    """Runs ``cloister`` in a process of its own, in ``cwd``, with no state but there."""
    env = {k: v for k, v in os.environ.items() if k != "CLOISTER_HOME"} | {"COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "cloister.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    return Said(done.returncode, done.stdout, done.stderr)


Here = Callable[..., Said]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The same command in this process, which has loaded torch already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOISTER_HOME", raising=False)

    def call(*arguments: str | Path) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, said.out, said.err)

    return call


def test_a_command_loads_no_torch_before_it_needs_it(tmp_path: Path) -> None:
    script = "import sys, cloister.cli, cloister_client.cli, cloister_server.cli; sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, timeout=120, check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(here: Here, tmp_path: Path, command: str) -> None:
    said = here(*command.split(), "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("Usage: ")
    for other in COMMANDS:
        if other and other.rpartition(" ")[0] == command:
            assert f"  {other.rpartition(' ')[2]} " in said.out
    assert list(tmp_path.iterdir()) == []


def test_help_from_a_shell(tmp_path: Path) -> None:
    said = cloister("rounds", "export", "--help", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert "Export a registered round" in said.out


def test_the_version(tmp_path: Path) -> None:
    said = cloister("--version", cwd=tmp_path)
    assert (said.code, said.out, said.err) == (0, f"{code_version()}\n", "")


@pytest.mark.parametrize("arguments", [("nonsense",), ("rounds", "show", "x"), ("rounds", "list", "--odd"), ()])
def test_usage_errors_exit_2(here: Here, arguments: tuple[str, ...]) -> None:
    said = here(*arguments)
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "Usage:" in said.err + said.out


def test_a_usage_error_is_json_where_json_was_asked_for(here: Here) -> None:
    said = here("--json", "nonsense")
    assert said.code == 2
    assert json.loads(said.out)["exit_code"] == 2


def test_no_home_is_one_error_line(tmp_path: Path) -> None:
    cloister("rounds", "list", cwd=tmp_path).one_error(2, "no registry here", "mend:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--json", "rounds", "list"), ("rounds", "list", "--json")])
def test_a_json_error_is_one_object(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    said = cloister(*arguments, cwd=tmp_path)
    assert (said.code, said.err) == (2, "")
    assert said.record["exit_code"] == 2
    assert said.record["error"] == "StateError"
    assert said.record["what"] == "no registry here"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"adapter_rate": "adapter_rate = nan"}, "adapter_rate"),
        ({"epsilon": "epsilon = 3.0"}, "epsilon or noise_multiplier"),
        ({"base": 'base = "/nowhere"'}, "not a base model folder"),
    ],
)
def test_init_on_bad_settings(here: Here, tmp_path: Path, tiny_bert: Path, change: dict[str, str], word: str) -> None:
    path = write_federation(tmp_path / "FEDERATION.toml", tiny_bert, **change)
    here("--home", tmp_path / "home", "coordinator", "init", path).one_error(2, str(path), word)
    assert not (tmp_path / "home").exists()


def test_init_makes_a_coordinator_and_shows_no_secret(here: Here, tmp_path: Path, tiny_bert: Path) -> None:
    path = write_federation(tmp_path / "FEDERATION.toml", tiny_bert)
    said = here("--home", tmp_path / "home", "--json", "coordinator", "init", path)
    assert (said.code, said.err) == (0, "")
    coordinator = open_coordinator(tmp_path / "home" / "coordinator")
    assert said.record["fingerprint"] == coordinator.card.fingerprint
    assert said.record["base"] == find_base(str(tiny_bert), "test").digest
    assert coordinator.card.bundle == build_bundle()[1]
    assert coordinator.token not in said.out
    again = here("--home", tmp_path / "home", "coordinator", "init", path)
    again.one_error(2, "already")


# Rounds


@dataclass
class Registry:
    """A coordinator's registry under a home."""

    home: Path
    store: Store
    run: Run
    schema: Schema


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Registry]:
    """Round 1 committed, round 2 aborted, and an older run."""
    home = tmp_path_factory.mktemp("registry")
    federation = read_federation(write_federation(home / "F.toml", tiny_bert))
    (home / "coordinator").mkdir()
    (home / "other").mkdir()
    other, run, schema = start_store(home / "other", federation, find_base(str(tiny_bert), "test"), 3)
    first = other.adapter(other.rounds(run.id)[0].adapter or "")
    other.close()
    SigningKey.generate().save(home / "coordinator" / "sign.key")
    store, older = Store(home / "coordinator"), run.model_dump() | {"id": "ee" * 16, "created": 1.0, "finished": 2.0}
    vector = np.ones(schema.size, dtype=np.float32)
    blob = store.blobs.put(to_safetensors(vector, schema, {}))
    store.start_run(Run(**older), to_safetensors(vector, schema, {}), a_model(run.base))
    run = Run(**run.model_dump())
    store.start_run(run, first, a_model(run.base))

    def asked(name: str, number: int) -> RoundClient:
        return RoundClient(
            run=run.id,
            number=number,
            client=name[-1] * 32,
            name=name,
            plan="11" * 32,
            core='{"secret": "core"}',
            weight=10.0,
            noise_multiplier=12.5,
            sample_rate=0.5,
            steps=2,
            delta=1e-5,
        )

    planned(store, run.id, 1, [asked("site-1", 1), asked("site-2", 1)])
    bad = {"verdict": "out-of-bounds", "reason": "head.bias moved by 9", "epsilon": 2.5, "received_bytes": 3000}
    changes: dict[str, dict[str, Any]] = {
        "1" * 32: {"verdict": "accepted", "epsilon": 1.5, "sent_bytes": 2000},
        "2" * 32: bad,
    }
    store.commit_round(run.id, 1, Commit(blob, 3.25, 0.5, changes, {"accuracy": 0.625, "macro_f1": 0.5, "loss": 1.0}))
    planned(store, run.id, 2, [asked("site-1", 2), asked("site-2", 2)])
    store.abort_round(run.id, 2, {"1" * 32: {"verdict": "missing"}})
    yield Registry(home, store, run, schema)
    store.close()


def test_rounds_list(registry: Registry, tmp_path: Path) -> None:
    said = cloister("--home", registry.home, "rounds", "list", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0][:2] == ["run", registry.run.id[:8]]
    assert ["0", "committed"] in [line[:2] for line in lines]
    assert ["1", "committed", "0.6250", "0.5000", "1", "1", "1.500", "2.500", "2", "3", "3.2"] in lines
    assert ["2", "aborted"] in [line[:2] for line in lines]
    assert "other runs: eeeeeeee" in said.out


def test_rounds_list_as_json(here: Here, registry: Registry) -> None:
    record = here("--home", registry.home, "rounds", "list", "--json").record
    assert (record["run"], record["finished"], record["other_runs"]) == (registry.run.id, False, ["ee" * 16])
    one = record["rounds"][1]
    assert (one["state"], one["participants"], one["refused"], one["missing"]) == ("committed", 1, 1, 0)
    assert one["epsilon"] == {"site-1": 1.5, "site-2": 2.5}
    assert one["metrics"] == {"accuracy": 0.625, "loss": 1.0, "macro_f1": 0.5}
    assert [r["state"] for r in record["rounds"]] == ["committed", "committed", "aborted"]
    other = here("--home", registry.home, "--json", "rounds", "list", "--run", "ee").record
    assert (other["run"], other["finished"]) == ("ee" * 16, True)


def test_rounds_show(here: Here, registry: Registry) -> None:
    said = here("--home", registry.home, "rounds", "show", "1")
    assert (said.code, said.err) == (0, "")
    assert "committed, accuracy 0.6250, macro-F1 0.5000" in said.out
    assert "digest checked" in said.out
    assert "head.bias moved by 9" in said.out
    record = here("--home", registry.home, "rounds", "show", "1", "--json").record
    assert [c["verdict"] for c in record["clients"]] == ["accepted", "out-of-bounds"]
    assert "core" not in record["clients"][0]


def test_rounds_errors(here: Here, registry: Registry) -> None:
    here("--home", registry.home, "rounds", "show", "9").one_error(2, "no such round", "0 to 2")
    here("--home", registry.home, "rounds", "list", "--run", "ff").one_error(2, "no such run")


def test_rounds_export(here: Here, registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--home", registry.home, "--json", "rounds", "export", "--out", out)
    said = here(*arguments)
    assert said.code == 0, said.err
    assert (said.record["round"], said.record["path"]) == (1, str(out))
    assert json.loads((out / "cloister.json").read_text())["round"] == 1
    assert (out / "adapter_model.safetensors").is_file()


def test_rounds_show_refuses_a_changed_adapter(here: Here, registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(registry.home / "coordinator", tmp_path / "coordinator")
    name = registry.store.last_committed(registry.run.id).adapter or ""
    path = tmp_path / "coordinator" / "blobs" / name[:2] / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said = here("--home", tmp_path, "rounds", "show", "1")
    # Its record is shown all the same.
    assert (said.code, "site-1" in said.out, "NOT THERE" in said.out, "blob was changed" in said.err) == (
        1,
        True,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("UPDATE round_client SET epsilon = 0.001 WHERE number = 1", "not as its log says"),
        ("UPDATE round SET state = 'aborted' WHERE number = 1", "the log says that this round is committed"),
        ("DELETE FROM round WHERE number = 1", "the log says that this round is committed"),
    ],
)
def test_rounds_list_tells_of_rows_that_are_not_as_the_log_says(
    here: Here, registry: Registry, tmp_path: Path, change: str, found: str
) -> None:
    shutil.copytree(registry.home / "coordinator", tmp_path / "coordinator")
    looks = (("rounds", "list"), ("rounds", "show", "1"))
    for look in looks:
        said = here("--home", tmp_path, "--json", *look)
        assert (said.code, json.loads(said.out)["damaged"]) == (0, None)
    with closing(Store(tmp_path / "coordinator")) as store:
        edit(store, change)
    for look in looks if "epsilon" in change else looks[:1]:
        said = here("--home", tmp_path, *look)
        assert (said.code, found in said.err) == (1, True)
        assert any(line.startswith("NOT AS THE LOG SAYS: ") for line in said.out.splitlines())
        said = here("--home", tmp_path, "--json", *look)
        assert said.code == 1
        # The record says it too: whoever reads no further must not take it for a good one.
        assert found in json.loads(said.out.splitlines()[0])["damaged"]


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [(("rounds", "list"), "pip install 'cloister[server]'"), (("demo",), "pip install 'cloister[all]'")],
)
@pytest.mark.parametrize("json_too", [False, True])
def test_a_command_of_a_half_that_is_not_here_says_so(arguments: tuple[str, ...], mend: str, json_too: bool) -> None:
    program = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'sqlmodel', 'sqlalchemy', 'flwr'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from cloister.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, *(["--json"] if json_too else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert mend in (json.loads(done.stdout)["mend"] if json_too else done.stderr)


# Runs


def admitted(home: Path, base: Path, port: int, sites: int = 2) -> Path:
    """A coordinator with admitted sites; returns the settings' path."""
    path = write_federation(home / "FEDERATION.toml", base, address=f'address = "127.0.0.1:{port}"')
    pinned = find_base(str(base), "test")
    init(home / "coordinator", read_federation(path), pinned.digest, build_bundle()[1])
    coordinator = open_coordinator(home / "coordinator")
    for number in range(1, sites + 1):
        make_desk(home / f"site-{number}", f"site-{number}", coordinator, pinned)
    return path


def test_run_without_sites(here: Here, tmp_path: Path, tiny_bert: Path) -> None:
    path = admitted(tmp_path, tiny_bert, free_port(), sites=1)
    said = here("--home", tmp_path, "run", path, "--wait", "1")
    said.one_error(2, "too few sites are admitted", "expected >= 2", "got 1")


def test_run_without_a_superlink(tmp_path: Path, tiny_bert: Path) -> None:
    path = admitted(tmp_path, tiny_bert, free_port())
    said = cloister("--home", tmp_path, "run", path, "--wait", "1", "--json", cwd=tmp_path)
    assert said.code == 2
    assert "Traceback" not in said.err
    assert said.record["what"] == "SuperLink cannot be reached"
    assert said.record["exit_code"] == 2
    store = Store(tmp_path / "coordinator")
    assert store.runs() == []
    store.close()


def test_run_with_a_wrong_token(here: Here, tmp_path: Path, tiny_bert: Path) -> None:
    path = admitted(tmp_path, tiny_bert, free_port())
    shutil.copytree(tmp_path / "coordinator", tmp_path / "other" / "coordinator")
    (tmp_path / "other" / "coordinator" / "control.token").write_text("wrong" * 8)
    command = [sys.executable, "-m", "cloister_server.superlink", "--home", str(tmp_path / "coordinator")]
    with (tmp_path / "superlink.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as superlink:
        try:
            said = here("--home", tmp_path / "other", "run", path, "--wait", "60")
        finally:
            superlink.terminate()
    said.one_error(2, "the operator's token is refused", "mend:")
    assert "wrongwrong" not in said.out + said.err
    store = Store(tmp_path / "other" / "coordinator")
    assert store.runs() == []
    store.close()


def test_run_with_other_settings(here: Here, tmp_path: Path, tiny_bert: Path) -> None:
    admitted(tmp_path, tiny_bert, free_port())
    other = write_federation(tmp_path / "OTHER.toml", tiny_bert, labels='labels = ["billing", "size"]')
    here("--home", tmp_path, "run", other, "--wait", "1").one_error(2, "enrolled for")


def test_admit_twice_under_two_keys(here: Here, tmp_path: Path, tiny_bert: Path) -> None:
    admitted(tmp_path / "one", tiny_bert, free_port())
    admitted(tmp_path / "two", tiny_bert, free_port())
    card = tmp_path / "two" / "site-1" / "card.json"
    said = here("--home", tmp_path / "one", "coordinator", "admit", card)
    said.one_error(2, "taken by another key")


def test_up_on_a_port_that_is_taken(here: Here, tmp_path: Path, tiny_bert: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        admitted(tmp_path, tiny_bert, taken.getsockname()[1])
        said = here("--home", tmp_path, "coordinator", "up")
    said.one_error(2, "cannot listen for the SuperLink", "a free port")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--epsilon", "nan"), "--epsilon"),
        (("--epsilon", "0"), "--epsilon"),
        (("--device", "tpu"), "--device"),
        (("--partition", "dirichlet:1"), "--partition"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_demo_refuses_bad_options(here: Here, tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    here("demo", *arguments).one_error(2, word)
    assert list(tmp_path.iterdir()) == []
