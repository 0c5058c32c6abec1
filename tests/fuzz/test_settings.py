"""Settings in a file or in flags have the values that are written there, or are refused in one line that names them."""

import contextlib
import dataclasses
import enum
import io
import json
import math
import typing

import pytest
import yaml
from fuzzing import HOSTILE, check_refusal, fuzz, mutate, text, value

from tunix_torch.config.aliases import ALIASES
from tunix_torch.config.checks import CHOICES
from tunix_torch.config.flags import CONFIGS, parse_job

pytestmark = pytest.mark.thorough

HINTS = {name: hint for config in CONFIGS for name, hint in typing.get_type_hints(config).items()}
FIELDS = {field.name: field for config in CONFIGS for field in dataclasses.fields(config) if field.init}
OWN = [name for config in CONFIGS for name in config.__annotations__ if name in FIELDS]
# What these become in force is something else, or they decide other settings, or others decide them.
RESOLVED = {
    *("device", "model_size", "model_name", "max_length", "max_prompt_length", "mesh_shape", "mesh_axes", "report_to"),
    *("generation_kwargs", "scale_rewards", "eval_strategy", "metric_for_best_model", "greater_is_better"),
    *("accelerator_config", "lr_scheduler_kwargs", "debug", "use_cpu", "dataloader_pin_memory", "warmup_steps"),
    *("warmup_ratio", "restore_callback_states_from_checkpoint", "fsdp", "fsdp_config", "deepspeed", "label_names"),
    *("do_eval", "optim_args", "parallelism_config", "output_dir", "run_name", "logging_dir", "local_rank"),
    *("hub_token", "min_p", "repetition_penalty", "generation_temperature", "generation_top_p", "generation_top_k"),
    *("generation_max_length", "logging_steps", "eval_steps", "save_steps", "load_best_model_at_end", "disable_tqdm"),
}
NUMBERS = (
    "0",
    "1",
    "-1",
    "2",
    "0.5",
    "1e-5",
    "1e5",
    "007",
    "1_000",
    "0x10",
    "inf",
    "nan",
    "-0",
    " 1",
    "1.",
    "٣",
    "1e400",
)
NUMBERS += ("9" * 400, "9" * 5000, "true", "None", "", "--", "½", "1,2", "[1]")


def kinds(name):
    hint = HINTS[name]
    return set(typing.get_args(hint) or (hint,)) | {hint}


def plausible(rng, name):
    """A value that a setting of this type may have, as a file holds it."""
    of = kinds(name)
    if name in CHOICES and rng.random() < 0.8:
        return rng.choice(list(CHOICES[name]))
    if bool in of and rng.random() < 0.8:
        return rng.choice([True, False])
    if int in of:
        return rng.choice([0, 1, 2, 4, 8, 64, -1, 10**6])
    if float in of:
        return rng.choice([0.0, 0.1, 0.5, 1.0, 2.0, 1e-5, 3, -0.5])
    if typing.get_origin(HINTS[name]) is list or any(typing.get_origin(part) is list for part in of):
        return rng.choice([["correctness"], [1.0, 2.0], ["a", "b"], []])
    return rng.choice(["x", "no", "steps", "adamw_torch", "a b", text(rng)])


def wild(rng, name):
    return [value(rng), text(rng), plausible(rng, name), rng.choice(NUMBERS)][rng.randrange(4)]


def number(words):
    with contextlib.suppress(ValueError, TypeError):
        return int(words) if not isinstance(words, float) else words  # exactly, however many digits there are
    try:
        return float(words)
    except (ValueError, TypeError, OverflowError):
        return None


def check_meaning(configs, name, given):
    """Check that a setting in force is what was given."""
    name = ALIASES.get(name, name)
    if name in RESOLVED or name not in OWN:
        return
    found = next(getattr(config, name) for config in configs if name in {f.name for f in dataclasses.fields(config)})
    if isinstance(given, list) and len(given) == 1 and not isinstance(found, list):
        given = given[0]  # as flags have it
    found = found.value if isinstance(found, enum.Enum) else found
    if given is None or given == "None" and found is None:
        return
    if isinstance(found, bool):
        assert str(given).lower() in (("true", "t", "yes", "y", "1") if found else ("false", "f", "no", "n", "0")), (
            name,
            given,
            found,
        )
    elif isinstance(found, int | float):
        assert not isinstance(given, bool) and number(given) == found and abs(found) != math.inf, (name, given, found)
    elif isinstance(found, str):
        assert found == str(given), (name, given, found)
    elif isinstance(found, list):
        many = given if isinstance(given, list) else [given]
        assert [str(part) for part in many] == [str(part) for part in found] or list(map(number, many)) == found
    elif isinstance(found, dict):
        assert found == (json.loads(given) if isinstance(given, str) else given), (name, given, found)
    else:
        assert found is None and given in ("", [], {}), (name, given, found)


def parsed(argv, *words):
    """The settings; None where they are refused in one line that has one of the words."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # of --help
            return parse_job(argv)
    except ValueError as error:
        check_refusal(error, *words)
        return None
    except SystemExit as error:
        assert error.code == 0 and {"--help", "-h"} & set(argv)
        return None


def settings_of_a_file(rng):
    if rng.random() < 0.1:
        return value(rng)
    names = rng.sample(OWN if rng.random() < 0.8 else list(FIELDS), rng.randrange(1, 4))
    made = {}
    for name in names:
        given = plausible(rng, name) if rng.random() < 0.8 else wild(rng, name)
        written = next((alias for alias, ours in ALIASES.items() if ours == name), name) if rng.random() < 0.1 else name
        made[written if rng.random() < 0.97 else mutate(rng, written.encode()).decode("utf-8", "ignore")] = given
    return made


def same(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one and other != other


def read_by_letter(content, end):
    """The settings in a file, read by another reader; None where there are none, or two of one name."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    try:
        words = content.decode("utf-8")
        return json.loads(words, object_pairs_hook=once) if end == ".json" else yaml.safe_load(words)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def test_a_config_file_means_what_it_says_or_is_refused(tmp_path):
    def check(rng):
        end = rng.choice([".json", ".yaml", ".yml"])
        path = tmp_path / f"settings{end}"
        made = settings_of_a_file(rng)
        if end == ".json":
            content = json.dumps(made, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        else:
            content = yaml.safe_dump(made, allow_unicode=rng.random() < 0.5)
        content = content.encode("utf-8", "surrogatepass")
        if rng.random() < 0.3:
            content = mutate(rng, content)
        path.write_bytes(content)
        given = read_by_letter(content, end)
        names = list(given) if isinstance(given, dict) else []
        configs = parsed(["--config", str(path)], str(path), "unknown setting", *names, *FIELDS)
        if configs is None:
            return "refused"
        assert given is not None or end != ".json", "what is no JSON is read"
        if end == ".json":
            assert isinstance(given, dict)
            for name, wanted in given.items():
                assert ALIASES.get(name, name) in FIELDS, f"{name!r} is no setting"
                check_meaning(configs, name, wanted)
        elif isinstance(given, dict):
            for name, wanted in given.items():
                assert ALIASES.get(name, name) in FIELDS, f"{name!r} is no setting"
                if number(wanted) is None and not isinstance(wanted, list | dict):  # YAML 1.1 has numbers of its own
                    check_meaning(configs, name, wanted)
        return "read"

    fuzz("config files", check, kinds=2)


def test_aliases_that_multiply_do_not_hang(tmp_path):
    """Each line makes ten of the line before, so thirty lines would make more values than any memory holds."""
    path = tmp_path / "settings.yaml"
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    for content in ("\n".join(["a0: &a0 [x]", *lines]), "seed: &a [*a]", "seed: &a {b: *a}"):
        path.write_text(content + "\n")
        fuzz("aliases", lambda rng: str(parsed(["--config", str(path)], str(path), "seed")), share=0)


def test_flags_mean_what_they_say_or_are_refused():
    def check(rng):
        argv, given, strays = [], {}, False
        for _ in range(rng.randrange(1, 5)):
            name = rng.choice(OWN if rng.random() < 0.8 else [*FIELDS, *ALIASES])
            kind = rng.random()
            if kind < 0.05:
                strays = True  # which may belong to the setting before it
                argv.append(
                    rng.choice(["--", "-", "-h", "@x", text(rng), "--no_such", "=", "--=", "--config", *HOSTILE])
                )
                continue
            wanted = plausible(rng, ALIASES.get(name, name)) if kind < 0.7 else wild(rng, ALIASES.get(name, name))
            many = [str(part) for part in wanted] if isinstance(wanted, list) else None
            words = many if many is not None else [json.dumps(wanted) if isinstance(wanted, dict) else str(wanted)]
            written = name if rng.random() < 0.97 else mutate(rng, name.encode()).decode("utf-8", "ignore")
            if len(words) == 1 and rng.random() < 0.5:
                argv.append(f"--{written}={words[0]}")
            else:
                argv += [f"--{written}", *words]
            strays = strays or "--" in words  # which is no value, but ends the flags
            given[written] = words if many is not None else words[0]
        configs = parsed(argv)
        if configs is None:
            return "refused"
        for name in given:
            assert ALIASES.get(name, name) in FIELDS, f"{name!r} is no setting"
        if not strays and all(argv.count(word) == 1 for word in argv):
            for name, wanted in given.items():
                if wanted != [] and [word.partition("=")[0] for word in argv].count(f"--{name}") == 1:
                    check_meaning(configs, name, wanted)
        return "read"

    fuzz("flags", check, kinds=2)
