import json

import pytest

from cnngru_edge.export.quantize.plan import Plan, Step
from cnngru_edge.models.errors import ExportError

PLAN = Plan(
    ("convs.0.conv", "grus.0.weight_hh_l0", "head"),
    frozenset({"head"}),
    (Step((), 1.5, 3, 20.0), Step(("head",), 0.0, 0, None)),
)


def test_a_plan_survives_its_file(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_a_plan_can_be_edited(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    raw = json.loads(path.read_text())
    raw["layers"] |= {"head": "int8", "convs.0.conv": "float"}
    del raw["log"]
    path.write_text(json.dumps(raw))
    assert Plan.load(path) == Plan(PLAN.layers, frozenset({"convs.0.conv"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "not a plan"),
        ("[]", "not a plan"),
        ('{"format": 1}', "not a plan"),
        ('{"format": 2, "layers": {}}', "another version's format"),
        (
            '{"format": 1, "layers": {"head": "fp16"}}',
            "layer 'head' is 'fp16', expected 'float' or 'int8'",
        ),
        (
            '{"format": 1, "layers": {"head": ["int8"]}}',
            r"layer 'head' is \['int8'\], expected 'float' or 'int8'",
        ),
    ],
)
def test_what_is_no_plan_is_named(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ExportError, match=f"{path}: {message}"):
        Plan.load(path)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"no such file; 'cnngru-edge export' writes plan.json"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_another_model_is_refused():
    PLAN.check(["head", "grus.0.weight_hh_l0", "convs.0.conv"])
    with pytest.raises(ExportError, match=r"another model: convs.1.conv, head only in one of the"):
        PLAN.check(["convs.0.conv", "convs.1.conv", "grus.0.weight_hh_l0"])


def test_the_share_in_int8_is_of_weights():
    weights = {"convs.0.conv": 100, "grus.0.weight_hh_l0": 700, "head": 200}
    assert PLAN.share_int8(weights) == pytest.approx(0.8)
    assert Plan(()).share_int8({}) == 0
