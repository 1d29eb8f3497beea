"""DeepSpeed names: all exist; if one is absent, its patch is skipped with a warning or the run is refused."""

import types

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.version import Version

from recurrent_bart.training.zero import deepspeed_patches
from recurrent_bart.training.zero.deepspeed_patches import FLUSHES, PATCHES, TESTED_VERSIONS
from recurrent_bart.training.zero.engine import build_engine, full_state_dict, reducing_once
from recurrent_bart.training.zero.gradient_sums import replaced
from test_setup import required
from tiny import BUCKET, random_ids, tiny_model

REDUCE = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def build(stage=2, bf16=True):
    torch.manual_seed(0)
    model = tiny_model(init_std=0.1).train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **BUCKET},
    }
    return build_engine(model, torch.optim.SGD(model.parameters(), lr=0.5), None, config)


def trained(engine):
    """Return the weights after a step of two passes."""
    torch.manual_seed(1)
    with reducing_once(engine):
        for _ in range(2):
            engine.backward(engine(random_ids(2, 3, 8), labels=random_ids(2, 4)).loss)
    engine.step()
    return full_state_dict(engine)


def hide(monkeypatch, owner, name):
    """Rename a method of a class, as a new DeepSpeed version might."""
    method = vars(owner)[name]
    monkeypatch.delattr(owner, name)
    monkeypatch.setattr(owner, "renamed", method, raising=False)


@STAGES
def test_the_installed_deepspeed_has_every_name(alone, stage, capsys):
    engine = build(stage)
    assert [patch.absent(engine) for patch in PATCHES if stage in patch.stages] == [[]] * sum(
        stage in patch.stages for patch in PATCHES
    )
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "name", "stage"),
    [
        (DeepSpeedZeroOptimizer, "get_grad_norm_direct", 2),
        (DeepSpeedZeroOptimizer, "has_overflow_partitioned_grads_serial", 2),
        (DeepSpeedZeroOptimizer_Stage3, REDUCE, 3),
        pytest.param(DeepSpeedZeroOptimizer_Stage3, "_prepare_fp32_grad_for_sub_group", 3, marks=pytest.mark.slow),
        pytest.param(DeepSpeedZeroOptimizer_Stage3, "_partition_all_parameters", 3, marks=pytest.mark.slow),
    ],
)
def test_what_saves_time_is_left_out_where_a_name_is_absent(alone, owner, name, stage, monkeypatch, capsys):
    hide(monkeypatch, owner, name)
    engine = build(stage)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert f"DeepSpeed {deepspeed.__version__}" in lines[0]
    assert f"optimizer.{name}" in lines[0]
    # no attribute is set that DeepSpeed does not read
    assert name not in vars(engine.optimizer)


@pytest.mark.parametrize("name", [*FLUSHES, "coalesce_grad_reduction", "_copy_recovery_script"])
def test_a_name_that_numbers_depend_on_must_be_there(alone, name, monkeypatch, capsys):
    hide(monkeypatch, deepspeed.DeepSpeedEngine, name)
    if name == "_copy_recovery_script":
        build()
        assert f"engine.{name}" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match=rf"no engine\.{name}, .*install deepspeed=={TESTED_VERSIONS[-1]}"):
            build()


@pytest.mark.slow
@STAGES
def test_another_version_trains_the_same_without_what_saves_time(alone, stage, monkeypatch, capsys):
    expected = trained(build(stage))
    monkeypatch.setattr(deepspeed, "__version__", "0.19.99")
    capsys.readouterr()
    engine = build(stage)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert "0.19.99 is not a tested version" in lines[0]
    assert "compute one norm of all gradients" in lines[0]
    found = trained(engine)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-7) for name in expected)


def test_a_flush_that_deepspeed_does_not_call_is_an_error(alone, monkeypatch):
    """Check the case in which the names exist but are no longer called."""
    engine = build()
    monkeypatch.setattr(type(engine), "coalesce_grad_reduction", lambda self: replaced(self))
    with pytest.raises(RuntimeError, match="has not reduced the gradients"), reducing_once(engine):
        engine.backward(engine(random_ids(2, 3, 8), labels=random_ids(2, 4)).loss)


def test_without_the_table_of_operators_it_says_that_it_may_compile(monkeypatch, capsys):
    monkeypatch.setattr(deepspeed, "ops", types.ModuleType("ops"))
    deepspeed_patches.skip_shared_memory_operator()
    assert "may compile" in capsys.readouterr().out


def test_tested_versions_lie_in_the_range_that_is_installed():
    (requirement,) = [it for it in required("train") if it.name == "deepspeed"]
    assert all(requirement.specifier.contains(version) for version in TESTED_VERSIONS)
    # a minor version may rename private functions
    newest = max(map(Version, TESTED_VERSIONS))
    assert not requirement.specifier.contains(f"{newest.major}.{newest.minor + 1}.0")


def test_replaced_methods_are_put_back_as_they_were():
    class Owner:
        def first(self):
            return "class"

        def second(self):
            return "class"

    owner = Owner()
    owner.second = lambda: "own"

    def fail():
        with replaced(owner, first=lambda: "new", second=lambda: "new"):
            assert (owner.first(), owner.second()) == ("new", "new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (owner.first(), owner.second(), list(vars(owner))) == ("class", "own", ["second"])
