"""What counts as a reply, and what the policy is told when it is none."""

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.agent.protocol import Answer, CropCall, Malformed, QueryCall

COMPOSITE = pb.COMPARISON_VIEW_COMPOSITE
EXEMPLAR = pb.ImageReference(uri="file:///exemplar.png")
CROP = (
    '<tool_call>{"name":"crop_image_normalized","arguments":{"bbox_2d":[0.1,0.2,0.3,0.4],"target_image":1}}</tool_call>'
)
QUERY = '<tool_call>{"name":"query_image","arguments":{}}</tool_call>'
ANSWER = '<answer>{"anomaly_present":true,"top_anomaly":"dent","bbox_2d":[0.1,0.2,0.3,0.4],"visual_descriptions":["a dent"]}</answer>'  # noqa: E501


def crop(box: str, rest: str = "") -> str:
    return f'<tool_call>{{"name":"crop_image_normalized","arguments":{{"bbox_2d":{box}{rest}}}}}</tool_call>'


def answer(body: str) -> str:
    return f"<answer>{body}</answer>"


def test_calls_are_read() -> None:
    assert protocol.parse(f"<think>where?</think>\n{CROP}\n") == CropCall((0.1, 0.2, 0.3, 0.4), 1)
    assert protocol.parse(QUERY) == QueryCall()
    assert protocol.parse(crop("[0,0,1,1]")) == CropCall((0.0, 0.0, 1.0, 1.0), 1)


def test_answers_are_read() -> None:
    reply = protocol.parse(f"<think>a dent</think>{ANSWER}")
    assert isinstance(reply, Answer)
    assert reply.verdict.anomaly_present
    assert reply.verdict.top_anomaly == "dent"
    assert reply.verdict.box.y_max == pytest.approx(0.4)
    assert list(reply.verdict.visual_descriptions) == ["a dent"]


def test_a_normal_answer_has_no_type_no_box_no_words() -> None:
    reply = protocol.parse(answer('{"anomaly_present":false,"top_anomaly":"dent","bbox_2d":[0,0,1,1],'
                                  '"visual_descriptions":["a dent"]}'))  # fmt: skip
    assert reply == Answer(pb.Verdict(anomaly_present=False, top_anomaly="none"))


@pytest.mark.parametrize("anomaly", [True, False])
def test_what_is_written_is_read_back(anomaly: bool) -> None:
    verdict = pb.Verdict(anomaly_present=anomaly, top_anomaly='a "quoted" — kind' if anomaly else "none")
    if anomaly:
        verdict.box.CopyFrom(pb.Box(x_min=0.25, y_min=0.5, x_max=0.75, y_max=1.0))
        verdict.visual_descriptions.append("größer <als> 1\n")
    assert protocol.parse(protocol.answer_reply("so", verdict)) == Answer(verdict)
    assert protocol.parse(protocol.crop_reply("look", (0.25, 0.5, 0.75, 1.0), 2)) == CropCall((0.25, 0.5, 0.75, 1.0), 2)
    assert protocol.parse(protocol.query_reply("compare")) == QueryCall()


MALFORMED: dict[str, tuple[str, str]] = {
    "empty": ("", "Give a <tool_call> or an <answer>"),
    "only thoughts": ("<think>hm</think>", "Give a <tool_call> or an <answer>"),
    "plain words": ("The part is fine.", "Give a <tool_call> or an <answer>"),
    "open think": ("<think>hm" + QUERY, "Close every tag"),
    "call not closed": ('<tool_call>{"name":"query_image"}', "Close every tag"),
    "answer not closed": ('<answer>{"anomaly_present":true', "Close every tag"),
    "words before": ("Sure! " + QUERY, "Close every tag"),
    "words after": (QUERY + " done", "Close every tag"),
    "two calls": (QUERY + QUERY, "exactly one"),
    "call and answer": (QUERY + ANSWER, "exactly one"),
    "answer and call": (ANSWER + QUERY, "exactly one"),
    "call in thoughts": (f"<think>{QUERY}</think>{QUERY}", "exactly one"),
    "answer inside a call": (f"<tool_call>{ANSWER}</tool_call>", "exactly one"),
    "two thoughts": ("<think>a</think><think>b</think>" + QUERY, "one thought"),
    "call: no JSON": ("<tool_call>crop it</tool_call>", "not valid JSON"),
    "call: cut JSON": ('<tool_call>{"name":"query_image"</tool_call>', "not valid JSON"),
    "call: empty": ("<tool_call></tool_call>", "not valid JSON"),
    "answer: half a character": (
        '<answer>{"anomaly_present":true,"visual_descriptions":["\\ud83d"]}</answer>', "not valid JSON"
    ),
    "call: a list": ("<tool_call>[]</tool_call>", "must be a JSON object"),
    "call: null": ("<tool_call>null</tool_call>", "must be a JSON object"),
    "call: python quotes": ("<tool_call>{'name':'query_image'}</tool_call>", "not valid JSON"),
    "call: deep nesting": ("<tool_call>" + "[" * 5000 + "</tool_call>", "not valid JSON"),
    "call: unknown tool": ('<tool_call>{"name":"rm","arguments":{}}</tool_call>', "no such tool"),
    "call: no name": ('<tool_call>{"arguments":{}}</tool_call>', "no such tool"),
    "call: name is a number": ('<tool_call>{"name":1}</tool_call>', "no such tool"),
    "call: name is a list": ('<tool_call>{"name":["query_image"]}</tool_call>', "no such tool"),
    "call: more keys": ('<tool_call>{"name":"query_image","arguments":{},"id":1}</tool_call>', "has only"),
    "call: arguments a string": ('<tool_call>{"name":"query_image","arguments":"{}"}</tool_call>', "must be an object"),
    "query: arguments": ('<tool_call>{"name":"query_image","arguments":{"k":3}}</tool_call>', "takes no arguments"),
    "crop: more arguments": (crop("[0,0,1,1]", ',"zoom":2'), "takes only"),
    "crop: no box": ('<tool_call>{"name":"crop_image_normalized","arguments":{}}</tool_call>', "four numbers"),
    "crop: three numbers": (crop("[0,0,1]"), "four numbers"),
    "crop: five numbers": (crop("[0,0,1,1,1]"), "four numbers"),
    "crop: strings": (crop('["0","0","1","1"]'), "numbers only"),
    "crop: booleans": (crop("[false,false,true,true]"), "numbers only"),
    "crop: nested": (crop("[[0,0],[1,1],0,0]"), "numbers only"),
    "crop: an object": (crop('{"x":0}'), "four numbers"),
    "crop: NaN": (crop("[NaN,0,1,1]"), "not valid JSON"),
    "crop: Infinity": (crop("[0,0,Infinity,1]"), "not valid JSON"),
    "crop: huge exponent": (crop("[0,0,1e999,1]"), "between 0 and 1"),
    "crop: huge integer": (crop("[0,0," + "9" * 400 + ",1]"), "between 0 and 1"),
    "crop: integer beyond the parser": (crop("[0,0," + "9" * 5000 + ",1]"), "not valid JSON"),
    "crop: negative": (crop("[-0.1,0,1,1]"), "between 0 and 1"),
    "crop: pixels": (crop("[10,10,200,200]"), "between 0 and 1"),
    "crop: reversed": (crop("[0.5,0,0.1,1]"), "x1 < x2"),
    "crop: empty box": (crop("[0.5,0.5,0.5,0.5]"), "x1 < x2"),
    "crop: image 0": (crop("[0,0,1,1]", ',"target_image":0'), "from 1"),
    "crop: image -1": (crop("[0,0,1,1]", ',"target_image":-1'), "from 1"),
    "crop: image 1.5": (crop("[0,0,1,1]", ',"target_image":1.5'), "from 1"),
    "crop: image true": (crop("[0,0,1,1]", ',"target_image":true'), "from 1"),
    "crop: image text": (crop("[0,0,1,1]", ',"target_image":"1"'), "from 1"),
    "answer: no JSON": (answer("yes"), "not valid JSON"),
    "answer: a list": (answer("[true]"), "must be a JSON object"),
    "answer: no verdict": (answer('{"top_anomaly":"dent"}'), "true or false"),
    "answer: verdict a string": (answer('{"anomaly_present":"true"}'), "true or false"),
    "answer: verdict a number": (answer('{"anomaly_present":1}'), "true or false"),
    "answer: type a list": (answer('{"anomaly_present":true,"top_anomaly":["dent"]}'), "must be a string"),
    "answer: words a string": (answer('{"anomaly_present":true,"visual_descriptions":"x"}'), "list of strings"),
    "answer: words of numbers": (answer('{"anomaly_present":true,"visual_descriptions":[1]}'), "list of strings"),
    "answer: reversed box": (answer('{"anomaly_present":true,"bbox_2d":[1,1,0,0]}'), "x1 < x2"),
    "answer: box of pixels": (answer('{"anomaly_present":true,"bbox_2d":[0,0,640,480]}'), "between 0 and 1"),
    "answer: box of text": (answer('{"anomaly_present":true,"bbox_2d":"[0,0,1,1]"}'), "four numbers"),
    "too long": (QUERY + " " * 20_000, "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_replies_are_explained(name: str) -> None:
    text, fragment = MALFORMED[name]
    reply = protocol.parse(text)
    assert isinstance(reply, Malformed)
    assert fragment in reply.reason
    assert len(reply.reason) < 120


def test_prompts_do_not_depend_on_anything_but_the_task() -> None:
    task = pb.Task(image=pb.Image(reference=pb.ImageReference(uri="file:///a.png")), category="bolt")
    listed = pb.Task(image=task.image, category="bolt", defect_types=["bent", "rust"])
    assert protocol.opening_messages(task) == protocol.opening_messages(task)
    assert "Defect types: bent, rust." in protocol.opening_messages(listed)[1].segments[1].text
    assert "Defect types" not in protocol.opening_messages(task)[1].segments[1].text


@pytest.mark.parametrize(
    ("observation", "view", "words"),
    [
        (pb.Observation(tool_error="too small"), COMPOSITE, "Error: too small"),
        (pb.Observation(region=pb.Box(x_max=0.5, y_max=0.25)), COMPOSITE, "closer, [0.00,0.00,0.50,0.25]"),
        (pb.Observation(exemplar=EXEMPLAR, registration_confidence=0.2), COMPOSITE, "not aligned"),
        (pb.Observation(exemplar=EXEMPLAR, registered=True), COMPOSITE, "blue difference"),
        (pb.Observation(exemplar=EXEMPLAR, registered=True), pb.COMPARISON_VIEW_SIDE_BY_SIDE, "normal part"),
    ],
)  # fmt: skip
def test_observations_say_what_they_show(
    observation: pb.Observation, view: "pb.ComparisonView.ValueType", words: str
) -> None:
    message = protocol.observation_message(observation, 3, view)
    assert message.role == pb.ROLE_USER
    assert words in message.segments[-1].text
    assert message.segments[0].HasField("image") == (not observation.tool_error)
