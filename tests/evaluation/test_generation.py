import functools

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from kd_utils.data.tasks import find_task
from kd_utils.evaluation.generation import generate, generate_answers

GSM8K = find_task("gsm8k").generation


answers = functools.partial(generate_answers, stop_strings=GSM8K.stop_strings)

PROMPTS = [
    "Question: Tom has 12 apples.\nAnswer:",
    "Answer:",
    "Question: How many apples has Tom if he buys 30?\n",
]


@pytest.fixture(scope="module", params=[True, False], ids=["begin", "no-begin"])
def tokenizer(request):
    return tiny_tokenizer(begin=request.param)


class Scripted(torch.nn.Module):
    """Stands for a model: `generate` goes through the given ids, one a step, whatever the
    prompt.
    """

    def __init__(self, tokenizer, scripts):
        super().__init__()
        from transformers import GenerationConfig

        self.generation_config, self.device = GenerationConfig(), torch.device("cpu")
        self.scripts, self.steps = scripts, 0
        self.config = tiny_model(tokenizer).config
        self.get_input_embeddings = self.get_output_embeddings = lambda: torch.nn.Embedding(
            len(tokenizer), 1
        )

    def generate(self, input_ids, generation_config, stopping_criteria, **kwargs):
        for step in range(generation_config.max_new_tokens):
            column = [[script[step] if step < len(script) else 5] for script in self.scripts]
            input_ids = torch.cat([input_ids, torch.tensor(column)], dim=1)
            self.steps = step + 1
            if bool(stopping_criteria(input_ids, None).all()):
                break
        return input_ids


def generated(tokenizer, *texts, max_new_tokens=60):
    scripts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    model = Scripted(tokenizer, scripts)
    prompts = ["Answer:"] * len(texts)
    return answers(model, tokenizer, prompts, batch_size=8, max_new_tokens=max_new_tokens), model


@pytest.mark.parametrize("stop", ["Question:", "</s>", "<|im_end|>", "<e>"])
def test_stops_at_each_stop_and_drops_it(tokenizer, stop):
    [text], model = generated(tokenizer, f" 42 apples.\n#### 42\n\n{stop} What else? #### 7")
    assert text == " 42 apples.\n#### 42\n\n"
    assert model.steps < 40


def test_a_stop_string_is_found_however_it_is_split(tokenizer):
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab Question: 3"]
    model = Scripted(tokenizer, [letters])
    assert answers(model, tokenizer, ["Answer:"], batch_size=1, max_new_tokens=30) == ["ab "]
    assert model.steps == len("ab Question:")


def test_rows_stop_for_themselves_and_the_batch_with_the_last(tokenizer):
    texts, model = generated(tokenizer, " 1<e> 2", " 1 2 3 4 5 6Question: 7", " 8<|im_end|> 9 9")
    assert texts == [" 1", " 1 2 3 4 5 6", " 8"]
    assert model.steps < 30


def test_the_prompts_own_stop_strings_do_not_count(tokenizer):
    script = tokenizer.encode(" 5 apples", add_special_tokens=False)
    prompts = ["Question: a </s> Question:"]
    [text] = answers(
        Scripted(tokenizer, [script]), tokenizer, prompts, batch_size=1, max_new_tokens=len(script)
    )
    assert text == " 5 apples"


def greedy_by_hand(model, tokenizer, ids, steps):
    start = len(ids)
    for _ in range(steps):
        ids = ids + [int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
            break
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    for stop in ("Question:", "</s>", "<|im_end|>"):
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_padded_batches_with_cache_equal_plain_greedy(tokenizer, batch_size):
    model = tiny_model(tokenizer)
    expected = [
        greedy_by_hand(model, tokenizer, tokenizer.encode(prompt), 20) for prompt in PROMPTS
    ]
    assert len(set(expected)) == 3
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert (
            answers(model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=20) == expected
        )
        assert tokenizer.padding_side == side


def test_the_models_own_sampling_and_length_do_not_count_and_its_penalties_do(tokenizer):
    """As in the harness, which is greedy by its own arguments and leaves the rest of
    generation_config alone.
    """
    from transformers import GenerationConfig

    model = tiny_model(tokenizer)
    plain = answers(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=20)
    model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.1, max_length=4
    )
    assert answers(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=20) == plain
    assert model.generation_config is own
    model.generation_config = GenerationConfig(repetition_penalty=9.0)
    assert answers(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=20) != plain


def test_the_models_own_end_tokens_count(tokenizer):
    model = tiny_model(tokenizer)
    first = tokenizer.encode("a", add_special_tokens=False)[0]
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[first] = 1.0
    model.model.norm.weight.data.zero_()  # every logit 0: the first id, "<b>", always wins
    assert answers(model, tokenizer, PROMPTS[:1], batch_size=1, max_new_tokens=5) == [""]
    model.generation_config.eos_token_id = [0, tokenizer.eos_token_id]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    answers(model, tokenizer, PROMPTS[:1], batch_size=1, max_new_tokens=5)
    assert len(calls) == 1


def test_a_long_prompt_is_cut_on_the_left_with_a_warning(tokenizer):
    model = tiny_model(tokenizer, context=64)
    long = "Tom has 12 apples. " * 20 + PROMPTS[0]
    with pytest.warns(UserWarning, match="1 prompts leave no room for 20 new tokens"):
        texts = answers(model, tokenizer, [long, PROMPTS[1]], batch_size=2, max_new_tokens=20)
    kept = [tokenizer.encode(prompt)[-44:] for prompt in (long, PROMPTS[1])]
    assert texts == [greedy_by_hand(model, tokenizer, ids, 20) for ids in kept]
    with pytest.raises(
        ValueError, match="max_new_tokens = 64 leaves no room .* 64 tokens, lower max_new_tokens"
    ):
        answers(model, tokenizer, PROMPTS, batch_size=2, max_new_tokens=64)


# What lm-evaluation-harness 0.4.13's two filters and its exact_match gave for these texts.
@pytest.mark.parametrize(
    "text, gold, strict, flexible, right, right_flexible",
    [
        (" 5 apples.\n#### 5", "5", "5", "5", True, True),
        (" so #### 1,200", "1200", "1,200", "1,200", True, True),
        (" so #### 1200.", "1,200", "1200.", "1200.", True, True),
        (" the answer is $18.", "18", "[invalid]", "$18.", False, True),
        (" #### 5 then 7", "5", "5", "7", True, False),
        (" #### 3\n#### 4", "4", "3", "4", False, True),
        (" #### $18", "18", "[invalid]", "$18", False, True),
        (" #### -3", "-3", "-3", "-3", True, True),
        (" ####5", "5", "[invalid]", "5", False, True),
        (" none at all", "5", "[invalid]", "[invalid]", False, False),
        (" #### 5..", "5", "5..", "5..", False, False),
        (" 7 ...", "7", "[invalid]", "...", False, False),
        ("", "5", "[invalid]", "[invalid]", False, False),
        (" #### 18.0", "18", "18.0", "18.0", False, False),
    ],
)
def test_extraction_and_match(text, gold, strict, flexible, right, right_flexible):
    assert (GSM8K.strict(text), GSM8K.flexible(text)) == (strict, flexible)
    assert GSM8K.score(text, gold) == {
        "prediction": strict,
        "correct": right,
        "correct_flexible": right_flexible,
    }


def test_normalised_number():
    assert GSM8K.normalise("12+3=15.\n#### 1,500.") == "1500"
    assert GSM8K.normalise("$[INVALID]") == "[invalid]"


def test_a_text_is_whole_if_it_stopped_by_itself(tokenizer):
    texts = [" one<e>", " one two", " one Question:", " one two three four five"]
    scripts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    longest = len(scripts[0])  # it stops with its very last token
    options = dict(stop_strings=GSM8K.stop_strings, batch_size=8)
    model = Scripted(tokenizer, scripts)
    found = generate(model, tokenizer, ["Answer:"] * 4, **options, max_new_tokens=longest)
    assert found[0] == (" one", True) and not any(whole for _, whole in found[1:])
    found = generate(
        Scripted(tokenizer, scripts[2:3]), tokenizer, ["Answer:"], **options, max_new_tokens=60
    )
    assert found == [(" one ", True)]
