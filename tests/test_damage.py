"""The short version of `python -m benchmarks.damage`."""

import pytest

from benchmarks import damage


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return damage.Workshop(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize(
    "name", ["newest checkpoint: state/manifest.ocdbt a bit flipped", "checkpoints/ removed"]
)
def test_what_comes_of_damage_is_what_may(name, shop):
    ((allowed, do, of),) = [task[1:] for task in damage.of_files() if task[0] == name]
    assert shop.damage(do, of=of)["outcome"] == allowed


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (0, "", "something else: started again from step 0"),
        (0, "x: resuming after step 20", "something else: went on from step 20 and did not say why"),
        (0, "x: resuming after step 30", "unharmed"),
        (2, "Traceback\nerror: x", "something else: Traceback"),
        (2, "error: x", "refused"),
    ],
)
def test_what_may_not_come_of_damage_is_told(code, text, outcome, shop):
    before = damage.contents(shop.undisturbed / "checkpoints")
    judged = shop.judge(shop.undisturbed, damage.Run(code, text), before, 30)
    assert judged["outcome"].startswith(outcome)


def test_a_run_that_ends_otherwise_than_an_undisturbed_one_is_told(shop, monkeypatch):
    monkeypatch.setattr(damage.faults, "differences", lambda *_: ["the final figures"])
    judged = shop.judge(shop.undisturbed, damage.Run(0, "x: resuming after step 30"), {}, 30)
    assert judged["outcome"].startswith("something else: the final figures differ")


@pytest.mark.parametrize(("then", "is_right"), [("unharmed", True), ("refused", False)])
def test_a_run_has_to_go_on_once_the_cause_is_gone(then, is_right, monkeypatch):
    def do(shop):
        del shop
        return {"outcome": "refused", "message": "", "then": {"outcome": then}}

    monkeypatch.setattr(damage, "can_mount", lambda: True)
    monkeypatch.setattr(damage, "of_files", lambda: [])
    monkeypatch.setattr(damage, "of_disks_and_processes", lambda: [("a full disk", "refused", do, True)])
    ((found,), left_out) = damage.inflict(None)
    assert found["is_right"] == is_right
    assert left_out == []


def test_a_changed_checkpoint_is_told(shop):
    judged = shop.judge(shop.undisturbed, damage.Run(2, "error: x"), {"30/checksums.json": b""}, 30)
    assert judged["outcome"] == "something else: it refused, and changed the checkpoints"
