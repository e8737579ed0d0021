from chatglm_tuning.prompt import build_prompt, process_response


def test_chat_prompts_equal_the_released_model(golden):
    for case in golden.json("generation")["chat"]:
        assert build_prompt(case["query"], [tuple(pair) for pair in case["history"]]) == case["prompt"]


def test_responses_are_cleaned_as_the_released_model_does(golden):
    for raw, expected in golden.json("generation")["process_response"]:
        assert process_response(raw) == expected
