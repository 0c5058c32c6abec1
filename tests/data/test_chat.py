"""Conversations become prompts and texts as a template writes them, and what the assistant writes is learned."""

import itertools

import datasets
import pytest
from tokenizers.processors import TemplateProcessing

from tunix_torch import GRPOConfig
from tunix_torch.data.prompts import prepare_rows, render_prompt
from tunix_torch.data.rows import COMPLETION_IDS, LEARNED, PROMPT, PROMPT_IDS, prompt_of
from tunix_torch.model import tiny


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


ASKED = [user("1 + 1?")]
THINKING = (  # in the way of Qwen 3: the last turn begins with a thought, which the prompt may hold already
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<reasoning></reasoning>' }}{% endif %}"
    "{{ message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<reasoning></reasoning>' }}{% endif %}{% endif %}"
)


def tokenizer_with(template=tiny.CHAT_TEMPLATE):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def as_list(rows):
    return list(rows)


def as_stream(rows):
    return datasets.IterableDataset.from_generator(rows.__iter__)


KINDS = [as_list, datasets.Dataset.from_list, as_stream]


def prepare(rows, tokenizer, kind=as_list, **settings):
    ready = prepare_rows(kind(rows), tokenizer, 200, **{"max_completion_length": 200} | settings)
    return list(itertools.islice(ready, len(rows)))


def learned_text(row, tokenizer):
    """What is learned of a row, as a text."""
    kept = zip(row[COMPLETION_IDS], row[LEARNED], strict=True)
    return tokenizer.decode([token for token, is_learned in kept if is_learned])


def whole_text(row, tokenizer):
    return tokenizer.decode(row[PROMPT_IDS] + row[COMPLETION_IDS])


# ---- what the assistant writes is learned, and nothing else ----

SHAPES = {
    "messages": (
        {"messages": [*ASKED, assistant("2"), user("Sure?"), assistant("Yes.")]},
        "2<end_of_turn>Yes.<end_of_turn>",
    ),
    "a system message": (
        {"messages": [{"role": "system", "content": "Be brief."}, *ASKED, assistant("2")]},
        "2<end_of_turn>",
    ),
    "a tool": (
        {"messages": [*ASKED, assistant("call"), {"role": "tool", "content": "2"}, assistant("It is 2.")]},
        "call<end_of_turn>It is 2.<end_of_turn>",
    ),
    "a question at the end": ({"messages": [*ASKED, assistant("2"), user("Sure?")]}, "2<end_of_turn>"),
    "prompt and completion as texts": ({"prompt": "1 + 1?", "completion": "2"}, "2<end_of_turn>"),
    "prompt and completion as messages": ({"prompt": ASKED, "completion": [assistant("2")]}, "2<end_of_turn>"),
    "an answer in the prompt": (
        {"prompt": [*ASKED, assistant("3"), user("Sure?")], "completion": [assistant("2")]},
        "2<end_of_turn>",
    ),
    "a completion of several messages": (
        {"prompt": ASKED, "completion": [assistant("2"), user("Sure?"), assistant("Yes.")]},
        "2<end_of_turn>Yes.<end_of_turn>",
    ),
    "a prompt as messages, a completion as text": ({"prompt": ASKED, "completion": "2"}, "2<end_of_turn>"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_assistants_turns_are_learned_and_the_whole_is_what_the_template_writes(shape, kind):
    tokenizer = tokenizer_with()
    row, expected = SHAPES[shape]
    (ready,) = prepare([row], tokenizer, kind)
    assert learned_text(ready, tokenizer) == expected
    prompt = row.get("prompt", [])
    messages = [*(ASKED if isinstance(prompt, str) else prompt), *row.get("messages", [])]
    completion = row.get("completion", [])
    messages += [assistant(completion)] if isinstance(completion, str) else completion
    while messages[-1]["role"] != "assistant":
        messages.pop()
    assert f"{whole_text(ready, tokenizer)}\n" == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_plain_text_is_learned_but_its_first_token(kind):
    tokenizer = tokenizer_with()
    (ready,) = prepare([{"text": "12 apples"}], tokenizer, kind)
    assert whole_text(ready, tokenizer) == "12 apples<end_of_turn>" and len(ready[PROMPT_IDS]) == 1
    assert ready[LEARNED] == [1] * len("12 apples")
    (ended,) = prepare([{"text": "12 apples<end_of_turn>"}], tokenizer, kind)
    assert ended[COMPLETION_IDS] == ready[COMPLETION_IDS], "an end that the text has is not written twice"


def test_what_a_template_adds_is_learned_where_the_model_must_write_it():
    tokenizer = tokenizer_with(THINKING)
    rows = [{"messages": [*ASKED, assistant("2"), user("Sure?"), assistant("Yes.")]}]
    (ready,) = prepare(rows, tokenizer)
    assert learned_text(ready, tokenizer) == "2<end_of_turn><reasoning></reasoning>Yes.<end_of_turn>"
    rows = [{"prompt": ASKED, "completion": [assistant("2")]}]
    (ready,) = prepare(rows, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert learned_text(ready, tokenizer) == "2<end_of_turn>", "here the prompt has it"
    assert whole_text(ready, tokenizer) == f"{render_prompt(tokenizer, ASKED)}<reasoning></reasoning>2<end_of_turn>"


def test_a_template_that_rewrites_earlier_turns_is_refused_since_no_one_text_has_them_all():
    forgetful = tiny.CHAT_TEMPLATE.replace(
        "message['content'] | trim", "(message['content'] if loop.last or message['role'] != 'assistant' else '...')"
    )
    conversation = [
        *ASKED,
        assistant("2"),
        {"role": "tool", "content": "x"},
        assistant("Yes."),
        user("?"),
        assistant("!"),
    ]
    rows = [{"messages": conversation[:4]}]
    (ready,) = prepare(rows, tokenizer_with(forgetful))
    assert learned_text(ready, tokenizer_with()).startswith("...<end_of_turn>"), "as the model is shown it"
    rewriting = forgetful.replace("loop.last", "loop.index0 + 2 >= messages | length")
    with pytest.raises(ValueError, match="data set, row 1: the chat template writes what stands before message 4 diff"):
        prepare([{"messages": conversation}], tokenizer_with(rewriting))


# ---- names and values for the template, and texts that stay as they are ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_own_names_and_values_for_the_template_win(kind):
    tokenizer = tokenizer_with(THINKING)
    rows = [{"prompt": ASKED, "chat_template_kwargs": own} for own in (None, {"enable_thinking": True})]
    ready = prepare(rows, tokenizer, kind, max_completion_length=None, chat_template_kwargs={"enable_thinking": False})
    assert [row[PROMPT].endswith("<reasoning></reasoning>") for row in ready] == [True, False]
    as_text = [{"prompt": ASKED, "chat_template_kwargs": '{"enable_thinking": false}'}]
    (ready,) = prepare(as_text, tokenizer, kind, max_completion_length=None)
    assert ready[PROMPT].endswith("<reasoning></reasoning>"), "JSON, as CSV files have it"


def test_tokens_of_one_setting_are_not_found_for_another(tmp_path):
    """The cache of a data set on disk must depend on the names and values, and on how texts are shown."""
    tokenizer = tokenizer_with(THINKING)
    datasets.Dataset.from_list([{"prompt": "1 + 1?"}] * 3).save_to_disk(tmp_path / "rows")
    for settings in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"wrap_prompts": False}):
        rows = prepare_rows(datasets.load_from_disk(tmp_path / "rows"), tokenizer, 200, **settings)
        expected = render_prompt(tokenizer, "1 + 1?", **settings)
        assert [row[PROMPT] for row in rows] == [expected] * 3
        assert tokenizer.decode(rows[0][PROMPT_IDS]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_not_wrapped_is_seen_as_it_stands_and_messages_are_rendered(kind):
    tokenizer = tokenizer_with()
    begin = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=begin)
    (text,) = prepare([{"prompt": " 1 + 1?\n"}], tokenizer, kind, max_completion_length=None, wrap_prompts=False)
    assert text[PROMPT] == prompt_of(text) == " 1 + 1?\n" and tokenizer.decode(text[PROMPT_IDS]) == "<bos> 1 + 1?\n"
    (row,) = prepare([{"prompt": ASKED}], tokenizer, kind, max_completion_length=None, wrap_prompts=False)
    assert row[PROMPT] == render_prompt(tokenizer, ASKED) and prompt_of(row) == ASKED
    assert row[PROMPT_IDS].count(tokenizer.bos_token_id) == 1, "the template has written it"


# ---- bad input ----


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "1 + 1?", "messages": ASKED}, "row 1: there is both a prompt and messages; leave one of them out"),
        ({"messages": []}, "row 1: the conversation is an empty list"),
        ({"messages": "1 + 1?"}, "row 1: the conversation is a str, expected a list of messages"),
        ({"messages": ASKED}, "row 1: the conversation has no message of the assistant, so there is nothing to learn"),
        (
            {"messages": [assistant("2")]},
            "row 1: the conversation begins with the assistant; expected a message of the",
        ),
        (
            {"messages": [*ASKED, {"role": "robot", "content": "2"}]},
            "message 2 of the conversation has the role 'robot'",
        ),
        ({"messages": [*ASKED, {"role": "assistant"}]}, "message 2 of the conversation has no text"),
        ({"prompt": ASKED, "completion": []}, "row 1: the completion is a list, .* and it is empty"),
        ({"prompt": ASKED, "completion": [user("2")]}, "none of its messages is the assistant's"),
        ({"prompt": "q", "completion": [assistant("2"), assistant("3")]}, "since the prompt is a text"),
        ({"text": " "}, "row 1: the text is blank"),
        ({"prompt": 7}, "row 1: the question is a int, expected a text or a list of messages"),
        (
            {"prompt": "q", "completion": "2", "chat_template_kwargs": [1]},
            r"row 1: chat_template_kwargs=\[1\]: expected names",
        ),
        (
            {"prompt": "q", "completion": "2", "chat_template_kwargs": "{x"},
            "row 1: chat_template_kwargs='{x': expected names",
        ),
        (
            {"answer": "7"},
            "row 1: no question; expected a column named prompt, question, messages or text; it has answer",
        ),
    ],
)
def test_a_row_that_can_not_be_learned_from_is_one_line_with_its_number(row, message):
    with pytest.raises(ValueError, match=message) as error:
        prepare([row], tokenizer_with())
    assert str(error.value).startswith("data set, row 1: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, message",
    [
        ([1], r"chat_template_kwargs=\[1\]: expected names and values"),
        ("{", "chat_template_kwargs='{': not valid JSON"),
        ("thinking", "chat_template_kwargs='thinking': expected names and values"),
        ({"tokenize": True}, "'tokenize' is given by the library itself; leave it out"),
    ],
)
def test_names_and_values_that_can_not_be_are_refused(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir=str(tmp_path), chat_template_kwargs=value)
    given = GRPOConfig(output_dir=str(tmp_path), chat_template_kwargs='{"enable_thinking": false}')
    assert given.chat_template_kwargs == {"enable_thinking": False}


def test_messages_or_names_and_values_without_a_template_are_refused():
    plain = tokenizer_with(None)
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        prepare([{"prompt": "q"}], plain, max_completion_length=None, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ValueError, match="data set, row 1: .*no chat template"):
        prepare([{"messages": [*ASKED, assistant("2")]}], plain)
    (ready,) = prepare([{"prompt": "1 + 1?", "completion": "2"}], plain)
    assert whole_text(ready, plain) == "1 + 1?\n2<end_of_turn>", "its end of a turn is the EOS token"


def test_rollouts_refuse_rows_without_a_question(subtests):
    for row, message in (
        ({"messages": [*ASKED, assistant("2")]}, "no question.*put the messages before the answer into prompt"),
        ({"text": "12 apples"}, "no question; expected a column named prompt or question; it has text"),
    ):
        with subtests.test(row=row), pytest.raises(ValueError, match=message):
            prepare([row], tokenizer_with(), max_completion_length=None)


def test_tools_answer_in_prompts_and_an_answer_may_be_a_call_alone():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    template = tiny.CHAT_TEMPLATE.replace("message['content'] | trim", "(message.content or 'call') | trim")
    turns = [*ASKED, call, {"role": "tool", "content": "2"}]
    (ready,) = prepare([{"prompt": turns}], tokenizer_with(template), max_completion_length=None)
    assert "model\ncall<end_of_turn>\n<start_of_turn>tool\n2<end_of_turn>" in ready[PROMPT]
