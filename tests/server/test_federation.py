"""Settings of a federation are checked whole; the coordinator's folder keeps its secrets; cards are admitted once."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cloister_server.coordinator import Coordinator, admit_site, init, open_coordinator
from cloister_server.federation import AUTO, read_federation
from cloister_server.planning import training_for
from cloister_server.run import KEPT, changed_settings, with_kept
from cloister_shared.cards import CoordinatorCard, SiteCard, read_coordinator_card
from cloister_shared.errors import InputError, StateError
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SigningKey
from cloister_shared.specs import RULES
from cloister_shared.tls import make_node_key

from support.server_world import write_federation

CAUSAL = {"kind": 'kind = "causal-lm"', "labels": "", "target_modules": 'target_modules = ["c_attn"]'}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A good FEDERATION.toml."""
    return write_federation(tmp_path / "FEDERATION.toml", tmp_path / "base")


@pytest.fixture
def home(tmp_path: Path, settings: Path) -> Path:
    """A coordinator's folder."""
    init(tmp_path / "coordinator", read_federation(settings), "cd" * 32, "ab" * 32)
    return tmp_path / "coordinator"


def a_card(
    folder: Path,
    name: str = "site-1",
    *,
    signing: SigningKey | None = None,
    node: str | None = None,
    records: int = 100,
) -> Path:
    """A signed card."""
    folder.mkdir(parents=True, exist_ok=True)
    signing = signing or SigningKey.generate()
    node = make_node_key(folder / f"{name}.node").decode() if node is None else node
    sealing = OpeningKey.generate().sealing_key.raw.hex()
    card = SiteCard(name, signing.verify_key.raw.hex(), sealing, node, records, "record", 8.0, 1e-5)
    card.save(folder / f"{name}.json", signing)
    return folder / f"{name}.json"


def test_good_settings_are_read(settings: Path) -> None:
    federation = read_federation(settings)
    assert (federation.name, federation.address, federation.rounds, federation.steps) == ("fed", "127.0.0.1:9092", 3, 2)
    assert federation.task.labels == ("billing", "delivery")
    assert (federation.epsilon, federation.noise_multiplier, federation.delta) == (None, 4.0, 1e-5)
    assert federation.held_out is None
    assert federation.path == settings.resolve()


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    changes = dict.fromkeys(
        ("base", "max_tokens", "target_modules", "rank", "alpha", "clipping_norm", "adapter_rate"), ""
    )
    federation = read_federation(write_federation(tmp_path / "F.toml", tmp_path, **changes))
    assert federation.base == "minilm"
    assert federation.task.target_modules == ("query", "value")
    assert (federation.task.rank, federation.clipping_norm, federation.adapter_rate) == (8, 4.0, 1e-3)
    assert (federation.task.words, federation.head_rounds, federation.task.centre) == (4096, 0, "")


def test_a_language_model_has_no_labels(tmp_path: Path) -> None:
    path = write_federation(tmp_path / "F.toml", tmp_path, **CAUSAL)
    assert read_federation(path).task.labels == ()
    path.write_text(path.read_text() + '[held_out]\npath = "h.jsonl"\ntext = "text"\n')
    held = read_federation(path).held_out
    assert held is not None
    assert (held.path, held.label) == (tmp_path / "h.jsonl", "")


@pytest.mark.parametrize(
    ("written", "rule"),
    [("", AUTO[True]), ('rule = "auto"', AUTO[True]), *((f'rule = "{r}"', r) for r in RULES)],
)
def test_the_rule_is_read_and_goes_with_the_task(tmp_path: Path, written: str, rule: str) -> None:
    table = f"[aggregation]\n{written}"
    federation = read_federation(write_federation(tmp_path / "F.toml", tmp_path, **{"[aggregation]": table}))
    assert federation.rule == rule
    assert federation.task.freeze_a == (rule == "freeze-a")


BAD: dict[str, tuple[dict[str, str], str]] = {
    "nan rate": ({"adapter_rate": "adapter_rate = nan"}, "adapter_rate"),
    "inf rate": ({"adapter_rate": "adapter_rate = inf"}, "adapter_rate"),
    "-inf rate": ({"head_rate": "head_rate = -inf"}, "head_rate"),
    "negative rate": ({"head_rate": "head_rate = -0.1"}, "head_rate"),
    "text rate": ({"head_rate": 'head_rate = "0.1"'}, "head_rate"),
    "nan clip": ({"clipping_norm": "clipping_norm = nan"}, "clipping_norm"),
    "zero clip": ({"clipping_norm": "clipping_norm = 0"}, "clipping_norm"),
    "nan noise": ({"noise_multiplier": "noise_multiplier = nan"}, "noise_multiplier"),
    "zero noise": ({"noise_multiplier": "noise_multiplier = 0.0"}, "noise_multiplier"),
    "nan epsilon": ({"noise_multiplier": "", "epsilon": "epsilon = nan"}, "epsilon"),
    "inf epsilon": ({"noise_multiplier": "", "epsilon": "epsilon = inf"}, "epsilon"),
    "negative epsilon": ({"noise_multiplier": "", "epsilon": "epsilon = -8"}, "epsilon"),
    "both": ({"epsilon": "epsilon = 8.0"}, "epsilon or noise_multiplier"),
    "neither": ({"noise_multiplier": ""}, "epsilon or noise_multiplier"),
    "delta one": ({"delta": "delta = 1.0"}, "delta"),
    "delta zero": ({"delta": "delta = 0"}, "delta"),
    "zero rounds": ({"rounds": "rounds = 0"}, "rounds"),
    "rounds missing": ({"rounds": ""}, "rounds"),
    "rounds true": ({"rounds": "rounds = true"}, "rounds"),
    "rounds float": ({"rounds": "rounds = 3.0"}, "rounds"),
    "negative steps": ({"steps": "steps = -1"}, "steps"),
    "zero batch": ({"batch": "batch = 0"}, "batch"),
    "huge rank": ({"rank": "rank = 10000"}, "rank"),
    "nan alpha": ({"alpha": "alpha = nan"}, "alpha"),
    "tokens": ({"max_tokens": "max_tokens = 3"}, "max_tokens"),
    "no modules": ({"target_modules": "target_modules = []"}, "modules"),
    "duplicate labels": ({"labels": 'labels = ["a", "a"]'}, "labels"),
    "one label": ({"labels": 'labels = ["a"]'}, "labels"),
    "no labels": ({"labels": ""}, "labels"),
    "empty label": ({"labels": 'labels = ["a", ""]'}, "labels"),
    "long label": ({"labels": f'labels = ["a", "{"b" * 300}"]'}, "labels"),
    "labels for a language model": (CAUSAL | {"labels": 'labels = ["a", "b"]'}, "labels"),
    "unknown kind": ({"kind": 'kind = "regression"'}, "kind"),
    "unknown key": ({"rank": "rank = 2\nrnk = 3"}, "rnk"),
    "unknown table": ({"delta": "delta = 1e-5\n[privcy]\nepsilon = 3"}, "privcy"),
    "unknown key of the round": ({"min_clients": "min_clients = 2\nmax_clients = 3"}, "max_clients"),
    "zero clients": ({"min_clients": "min_clients = 0"}, "min_clients"),
    "nan deadline": ({"deadline_seconds": "deadline_seconds = nan"}, "deadline_seconds"),
    "address without port": ({"address": 'address = "127.0.0.1"'}, "address"),
    "address without host": ({"address": 'address = ":9092"'}, "address"),
    "address with a big port": ({"address": 'address = "127.0.0.1:99999"'}, "address"),
    "address with port zero": ({"address": 'address = "127.0.0.1:0"'}, "address"),
    "address with words": ({"address": 'address = "127.0.0.1:http"'}, "address"),
    "unknown rule": ({"[aggregation]": '[aggregation]\nrule = "mean"'}, "rule"),
    "unknown key of the aggregation": ({"[aggregation]": "[aggregation]\ntrim = 1"}, "trim"),
    "name": ({"name": 'name = "Not A Name"'}, "name"),
    "name with a path": ({"name": 'name = "../up"'}, "name"),
    "task is text": ({"[task]": "", "kind": "", "labels": "", "max_tokens": "task = 3"}, "task"),
    "held-out without text": ({"min_clients": 'min_clients = 2\n[held_out]\npath = "x.jsonl"'}, "text"),
    "held-out without label": ({"min_clients": 'min_clients = 2\n[held_out]\npath = "x"\ntext = "t"'}, "label"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_with_its_file(tmp_path: Path, case: str) -> None:
    changes, key = BAD[case]
    path = write_federation(tmp_path / "BAD.toml", tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_federation(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert key in str(caught.value)


def test_a_port_in_odd_digits_is_a_bad_address(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_federation(write_federation(tmp_path / "F.toml", tmp_path, address='address = "127.0.0.1:²"'))


@pytest.mark.parametrize("content", [b"", b"name = ", b"\xff\xfe", b"name = 1\nname = 2\n"])
def test_a_file_that_is_not_settings(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "F.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"F\.toml"):
        read_federation(path)
    with pytest.raises(InputError, match=r"missing\.toml"):
        read_federation(tmp_path / "missing.toml")
    with pytest.raises(InputError):
        read_federation(tmp_path)


def test_noise_is_calibrated_for_the_whole_run(tmp_path: Path, home: Path) -> None:
    path = write_federation(tmp_path / "E.toml", tmp_path, noise_multiplier="", epsilon="epsilon = 3.0")
    federation = read_federation(path)
    card = admit_site(home, a_card(tmp_path / "cards", records=100))
    spec = training_for(federation, card)
    assert spec.sample_rate == pytest.approx(0.125)  # the next of four to the octave above 12 of 100
    assert spec.expected_batch == pytest.approx(12.5)
    steps = spec.steps * federation.rounds
    assert epsilon([DpSgd(spec.noise_multiplier, spec.sample_rate, steps)], spec.delta) <= 3.0
    tighter = round(spec.noise_multiplier - 0.01, 2)
    assert epsilon([DpSgd(tighter, spec.sample_rate, steps)], spec.delta) > 3.0


def test_a_small_site_samples_everything(tmp_path: Path, settings: Path, home: Path) -> None:
    spec = training_for(read_federation(settings), admit_site(home, a_card(tmp_path / "cards", records=5)))
    assert (spec.sample_rate, spec.expected_batch, spec.noise_multiplier) == (1.0, 5.0, 4.0)


def test_init_twice_is_refused_and_changes_nothing(home: Path, settings: Path) -> None:
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="already"):
        init(home, read_federation(settings), "cd" * 32, "ab" * 32)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def test_secrets_are_their_owners_alone(home: Path) -> None:
    public = {"card.json", "ca.crt", "tls.crt", "site-ca.crt"}
    for path in home.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o644 if path.name in public else 0o600), path
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def secrets_of(coordinator: Coordinator) -> list[str]:
    """Every secret of a coordinator, in the forms it could be printed in."""
    home = coordinator.home
    raw = [(home / name).read_bytes() for name in ("sign.key", "superexec.secret", "control.token")]
    raw.append((home / "tls" / "tls.key").read_bytes())
    return [form for data in raw for form in (data.hex(), repr(data)[2:-1], data.decode("latin-1"))]


def test_no_secret_is_ever_shown(home: Path) -> None:
    coordinator = open_coordinator(home)
    shown = [repr(coordinator), str(coordinator), repr(coordinator.card), str(coordinator.card)]
    shown += [repr(coordinator.signing), str(coordinator.signing), (home / "card.json").read_text()]
    for secret in secrets_of(coordinator):
        assert not any(secret in text for text in shown)
    assert coordinator.token.encode() == (home / "control.token").read_bytes()
    assert len(coordinator.token) >= 32
    assert len(coordinator.secret) == 32


def test_two_federations_share_no_secret(tmp_path: Path, settings: Path, home: Path) -> None:
    init(tmp_path / "other", read_federation(settings), "cd" * 32, "ab" * 32)
    one, two = open_coordinator(home), open_coordinator(tmp_path / "other")
    assert not set(secrets_of(one)) & set(secrets_of(two))
    assert one.card.key != two.card.key


@pytest.mark.parametrize("name", ["sign.key", "superexec.secret", "control.token"])
def test_a_secret_that_others_can_read_is_refused(home: Path, name: str) -> None:
    (home / name).chmod(0o644)

    def use() -> None:
        coordinator = open_coordinator(home)
        assert coordinator.secret
        assert coordinator.token

    with pytest.raises(StateError, match="open to others"):
        use()


def test_the_card_says_what_was_agreed(home: Path, settings: Path) -> None:
    card: CoordinatorCard = read_coordinator_card(home / "card.json")
    assert (card.federation, card.base, card.bundle, card.labels) == (
        "fed",
        "cd" * 32,
        "ab" * 32,
        ("billing", "delivery"),
    )
    assert card.verify_key == open_coordinator(home).signing.verify_key
    assert open_coordinator(home).federation.path == settings.resolve()


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": 'labels = ["billing", "other"]'},
        {"labels": 'labels = ["delivery", "billing"]'},
        {"name": 'name = "fed2"'},
        CAUSAL,
    ],
)
def test_other_settings_than_agreed_are_refused(tmp_path: Path, home: Path, changes: dict[str, str]) -> None:
    other = read_federation(write_federation(tmp_path / "other.toml", tmp_path, **changes))
    with pytest.raises(InputError, match="enrolled for"):
        open_coordinator(home, other)


def test_no_coordinator(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no coordinator here"):
        open_coordinator(tmp_path)


def test_a_site_is_admitted_and_again(tmp_path: Path, home: Path) -> None:
    path = a_card(tmp_path / "cards")
    assert admit_site(home, path).name == "site-1"
    admit_site(home, path)
    assert [c.name for c in open_coordinator(home).sites()] == ["site-1"]
    assert (home / "sites" / "site-1.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("records", 99999),
        ("name", "site-2"),
        ("sealing", None),
        ("node", "PEM"),
        ("key", None),
        ("signature", "00" * 64),
    ],
)
def test_a_tampered_card_is_refused(tmp_path: Path, home: Path, field: str, value: object) -> None:
    path = a_card(tmp_path / "cards")
    record = json.loads(path.read_text())
    other = json.loads(a_card(tmp_path / "others").read_text())
    record[field] = other[field] if value is None else value
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="not signed by the key"):
        admit_site(home, path)
    assert open_coordinator(home).sites() == ()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"name": "site-1", "name": "site-2"}', b'{"records": NaN}']
)
def test_what_is_no_card_is_refused(tmp_path: Path, home: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(InputError, match=r"card\.json"):
        admit_site(home, tmp_path / "card.json")
    assert open_coordinator(home).sites() == ()


@pytest.mark.parametrize("name", ["../card", "UPPER", "", "a" * 41, "a/b", "a.b"])
def test_a_signed_card_with_an_odd_name_is_refused(tmp_path: Path, home: Path, name: str) -> None:
    signing = SigningKey.generate()
    node = make_node_key(tmp_path / "node").decode()
    card = SiteCard(
        name, signing.verify_key.raw.hex(), OpeningKey.generate().sealing_key.raw.hex(), node, 5, "record", 8.0, 1e-5
    )
    card.save(tmp_path / "card.json", signing)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="not a name"):
        admit_site(home, tmp_path / "card.json")
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("records", [0, -1])
def test_a_site_without_records_is_refused(tmp_path: Path, home: Path, records: int) -> None:
    with pytest.raises(InputError, match="malformed"):
        admit_site(home, a_card(tmp_path / "cards", records=records))


def test_a_name_belongs_to_its_key(tmp_path: Path, home: Path) -> None:
    admit_site(home, a_card(tmp_path / "one"))
    kept = (home / "sites" / "site-1.json").read_bytes()
    with pytest.raises(InputError, match="taken by another key"):
        admit_site(home, a_card(tmp_path / "two"))
    assert (home / "sites" / "site-1.json").read_bytes() == kept


def test_a_key_has_one_name(tmp_path: Path, home: Path) -> None:
    signing = SigningKey.generate()
    admit_site(home, a_card(tmp_path / "one", "site-1", signing=signing))
    with pytest.raises(InputError, match="another name"):
        admit_site(home, a_card(tmp_path / "two", "site-2", signing=signing))
    node = open_coordinator(home).sites()[0].node
    with pytest.raises(InputError, match="another name"):
        admit_site(home, a_card(tmp_path / "three", "site-3", node=node))
    assert [c.name for c in open_coordinator(home).sites()] == ["site-1"]


def test_a_card_that_no_plan_can_carry_is_refused(tmp_path: Path, home: Path) -> None:
    with pytest.raises(InputError):
        admit_site(home, a_card(tmp_path / "cards", records=10**10))


def test_a_card_without_a_node_key_is_refused(tmp_path: Path, home: Path) -> None:
    with pytest.raises(InputError):
        admit_site(home, a_card(tmp_path / "cards", node="not a PEM"))


def test_two_services_on_one_address_are_refused(tmp_path: Path) -> None:
    text = '[registry]\naddress = "127.0.0.1:5"\nenrolment = "127.0.0.1:5"\n'
    path = write_federation(tmp_path / "FEDERATION.toml", tmp_path / "base")
    path.write_text(path.read_text() + text)
    with pytest.raises(InputError, match="addresses of their own"):
        read_federation(path)


def test_an_unknown_key_is_told_with_all_that_are_known(tmp_path: Path) -> None:
    path = write_federation(tmp_path / "FEDERATION.toml", tmp_path / "base")
    path.write_text(path.read_text() + '[defence]\nrule = "mean"\nmarginn = 1\n')
    with pytest.raises(InputError, match=r"attackers, label_margin, margin, rule, sites_margin"):
        read_federation(path)


def test_a_resumed_run_keeps_what_its_privacy_was_planned_with(tmp_path: Path) -> None:
    """Whoever comes later is asked as the others were, whatever the file says by now; the rest is as the file has it."""
    path = write_federation(tmp_path / "FEDERATION.toml", tmp_path / "base")
    begun = path.read_text()
    before = read_federation(path)
    path.write_text(begun.replace("rounds = 3", "rounds = 9").replace("min_clients = 2", "min_clients = 3"))
    now = read_federation(path)
    assert (now.rounds, now.min_clients) != (before.rounds, before.min_clients)
    kept = with_kept(now, begun)
    assert kept == replace(now, rounds=before.rounds)
    assert set(KEPT) == {k for k in KEPT if len(k.split(".")) == 2 and hasattr(before, KEPT[k])}


def test_a_run_under_masks_is_not_resumed_with_numbers_beside_them(tmp_path: Path) -> None:
    path = write_federation(tmp_path / "FEDERATION.toml", tmp_path / "base")
    without = path.read_text()
    path.write_text(without + "\n[noised]\nloss = 2.0\n")
    with pytest.raises(InputError, match="under masks"):
        with_kept(read_federation(path), without + "\n[secure_aggregation]\ngroup = 4\n")


@pytest.mark.parametrize(
    ("begun", "now", "words"),
    [
        (
            "",
            '[secure_aggregation]\ngroup = 4\n[defence]\nrule = "krum"\nattackers = 3\n',
            "fewer updates than this defence",
        ),
        ("rounds", "[training]", "more rounds for the head"),
    ],
)
def test_what_a_resumed_run_keeps_goes_with_what_the_file_says_by_now(
    tmp_path: Path, begun: str, now: str, words: str
) -> None:
    """Else every site's budget would be spent on rounds that can only be held."""
    path = write_federation(tmp_path / "FEDERATION.toml", tmp_path / "base")
    before = path.read_text()
    if begun:
        path.write_text(before.replace("rounds = 3", "rounds = 9\nhead_rounds = 6"))
    else:
        path.write_text(before + now)
    with pytest.raises(InputError, match=words):
        with_kept(read_federation(path), before)


def test_what_changed_between_two_settings_is_named() -> None:
    before = 'name = "x"\n[training]\nrounds = 3\nsteps = 1\n[round]\nmin_clients = 2\n'
    now = 'name = "x"\n[training]\nrounds = 4\nsteps = 1\n[round]\nmin_clients = 2\ndeadline_seconds = 9\n'
    assert changed_settings(before, now) == ["round.deadline_seconds", "training.rounds"]
    assert changed_settings(now, now) == []
