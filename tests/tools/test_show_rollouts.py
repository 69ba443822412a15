"""The page of saved episodes in a real browser, and their text for a terminal."""

import json
import re

import pytest

from examples.tcod.tools import show_rollouts
from examples.tcod.tools.rollout_text import printable, rollout_text, shortest_won
from tests.support.browser import Browser, find_browser
from tests.support.episodes import made_up, save

NUM_GPUS = 0
HOSTILE = "</script><script>window.broken = 1</script><!-- <img src=x onerror='window.broken = 1'>"
HOSTILE += " \u2028 \ud800 \u202e \x1b[31m 🐢"


@pytest.fixture(scope="module")
def browser():
    if not find_browser():
        pytest.skip("no Chromium to try the page in: on Debian, apt-get install chromium")
    with Browser() as browser:
        yield browser
    assert browser.errors == []
    assert not [address for address in browser.requests if not address.startswith(("file:", "about:"))]


def page_of(folder, *runs):
    path = folder / "rollouts.html"
    path.write_text(show_rollouts.make_page(show_rollouts.read_runs(runs)))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs: F2B with 12 episodes of three tasks, three of them failed; B2F with 4, replayed turns among them."""
    folder = tmp_path_factory.mktemp("runs")
    one = [made_up(i, n=i // 3, task=i % 3, turns=2 + i % 4) for i in range(12)]
    for episode in one[::4]:
        episode |= {"failure": "env_timeout", "detail": "no reply in 120 s", "spans": [], "kl": None}
    one[1]["turns"][-1] |= {"cut": True, "valid": False, "action": "go to"}
    two = [made_up(i, n=9, task=5, turns=5, replayed=2, arm="b2f", dataset="unseen") for i in range(4)]
    two[3] |= {"context_limited": True}
    (folder / "f2b-1").mkdir()
    about = {"command": "python train.py", "versions": {"torch": "2.9"}, "settings": {"tcod_eta": 5}}
    (folder / "f2b-1" / "about.json").write_text(json.dumps({"launches": [{}, about]}))
    return page_of(folder, save(folder / "f2b-1", one), save(folder / "b2f-1", two, "eval_unseen_000009"))


def column(browser, name):
    names = [text.strip(" ▲▼") for text in browser.texts("#rows th")]
    return browser.texts(f"#rows tbody td:nth-child({names.index(name) + 1})")


def test_the_list_is_filtered(browser, page):
    browser.open(page)
    assert browser.text("#count") == "16 of 16 episodes: 5 won, 8 lost, 3 failed"
    for name, value, count in (
        ("outcome", "won", "5 of 16 episodes: 5 won, 0 lost, 0 failed"),
        ("outcome", "lost", "8 of 16 episodes: 0 won, 8 lost, 0 failed"),
        ("outcome", "failed: env_timeout", "3 of 16 episodes: 0 won, 0 lost, 3 failed"),
        ("arm", "b2f", "4 of 16 episodes: 2 won, 2 lost, 0 failed"),
        ("set", "unseen", "4 of 16 episodes: 2 won, 2 lost, 0 failed"),
        ("k", "2", "3 of 16 episodes: 0 won, 0 lost, 3 failed"),
        ("task type", "heat", "4 of 16 episodes: 1 won, 2 lost, 1 failed"),
    ):
        browser.choose(name, value)
        assert browser.text("#count") == count
        browser.choose(name, "")
    browser.press("/")
    for key in "fridge":
        browser.press(key)
    assert browser.text("#count").startswith("0 of 16") and browser.texts("#rows tbody tr") == []


def test_the_list_is_sorted_and_rows_without_a_number_come_last(browser, page):
    browser.open(page)
    assert column(browser, "step") == sorted(column(browser, "step"), key=int)
    heads = [text.strip() for text in browser.texts("#rows th")]
    for clicks in (1, 2):
        browser.click("#rows th button", heads.index("KL"))
        values = column(browser, "KL")
        numbers = [float(value.replace("−", "-")) for value in values if value]
        assert numbers == sorted(numbers, reverse=clicks == 1) and values[-3:] == ["", "", ""]
    assert browser.run("document.querySelector('#rows th[data-key=kl]').getAttribute('aria-sort')") == "ascending"
    browser.click("#rows th button", heads.index("turns"))
    turns = [int(value) for value in column(browser, "turns")]
    assert turns == sorted(turns, reverse=True)


def test_hovering_a_token_shows_its_numbers_and_a_button_shows_all(browser, page):
    browser.open(page, fragment="#1")
    token = json.loads(re.search(r'id="e1">(.*)</script>', page.read_text())[1])["spans"][1]
    kl = token["student"][0] - token["teacher"][0]
    browser.hover("#episode .token")
    tip = browser.text("#tip").replace("−", "-").split("\n")
    assert tip[0] == json.dumps(token["tokens"][0])
    assert tip[1].startswith(f"student {token['student'][0]:.3f} nats, probability 0.")
    assert tip[2].startswith(f"teacher {token['teacher'][0]:.3f} nats") and tip[3] == f"KL {kl:+.2f} nats"
    browser.hover("#episode h2")
    assert browser.run("document.getElementById('tip').hidden")
    number = "getComputedStyle(document.querySelector('#episode .token'), '::after').content"
    assert browser.run(number) == "none"
    browser.click("#numbers")
    assert browser.run(number).replace("−", "-") == f'"{kl:+.2f}"'
    browser.press("#")
    assert browser.run(number) == "none"


def test_shades_have_lines_too_and_differ_by_sign_without_colour(browser, page):
    browser.open(page, fragment="#1")
    looks = browser.run(
        "Object.fromEntries([...document.querySelectorAll('#legend .token')].map((one) => { const look ="
        " getComputedStyle(one); return [one.textContent, [look.borderBottomWidth, look.borderBottomStyle]]; }))"
    )
    assert len({tuple(look) for look in looks.values()}) == 9


def test_keys_go_through_the_list_and_through_the_steps_of_a_task(browser, page):
    browser.open(page)
    goals = [browser.text("#episode h2")]
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
        goals.append(browser.text("#episode h2"))
    order = column(browser, "task")
    assert goals == [order[i] for i in (0, 1, 2, 1, 0, 0)]
    assert browser.run("document.querySelector('#rows [aria-selected=true]').dataset.id") == "0"
    for key, at in (("]", "3"), ("]", "6"), ("[", "3")):
        browser.press(key)
        assert browser.run("location.hash") == f"#{at}"
    browser.choose("outcome", "lost")
    browser.press("j")
    assert browser.text("#episode .ending") == "✗ lost"


def test_the_same_task_is_linked_at_its_other_steps(browser, page):
    browser.open(page, fragment="#1")
    links = browser.texts(".same button")
    assert [re.search(r"step (\d+)", link)[1] for link in links] == ["0", "1", "2", "3"]
    browser.click(".same button", 2)
    assert browser.run("location.hash") == "#7" and "step 2" in browser.text(".facts")
    assert browser.run("document.querySelector('.same [aria-current]').dataset.to") == "7"


def test_an_episode_is_a_conversation_with_replayed_turns_set_apart(browser, page):
    browser.open(page, fragment="#12")
    assert browser.run("[...document.querySelectorAll('.turn')].map((one) => one.className)") == [
        *["turn replayed"] * 2,
        *["turn student"] * 3,
    ]
    assert "replayed from the demonstration, not trained" in browser.text(".turn.replayed")
    episode = json.loads(re.search(r'id="e12">(.*)</script>', page.read_text())[1])
    assert browser.text(".turn.student .action") == episode["turns"][2]["action"]
    bars = browser.texts(".chart button")
    assert [bar.split()[-1] for bar in bars] == ["1", "2", "3", "4", "5"]
    assert float(bars[2].split()[0].replace("−", "-")) == pytest.approx(episode["turns"][2]["kl"], abs=0.06)
    browser.click(".chart button", 3)
    assert browser.run("document.querySelector('.turn.marked').id") == "turn-3"


def test_limits_and_failures_are_said(browser, page):
    browser.open(page, fragment="#1")
    notes = browser.texts(".turn .note")
    assert notes == ["no valid format", "✂ cut by the length limit"]
    browser.open(page, fragment="#15")
    assert "The context had no room for a further turn." in browser.text(".end")
    browser.open(page, fragment="#0")
    assert browser.text("#episode .ending") == "! failed: env_timeout" and "no reply in 120 s" in browser.text(
        "#episode"
    )
    browser.run("document.getElementById('about').open = true")
    assert "python train.py" in browser.text("#about") and "It has no about.json." in browser.text("#about")


def test_hostile_text_is_text(browser, tmp_path):
    episode = made_up(0, turns=2, goal=HOSTILE, task_type=HOSTILE, outcome=HOSTILE)
    episode["task"] = {"x": HOSTILE}
    episode["turns"][0] |= {"observation": HOSTILE, "action": HOSTILE, "response": HOSTILE}
    episode["spans"][1]["tokens"][:2] = [HOSTILE, "\ufeff"]
    page = page_of(tmp_path, save(tmp_path, [episode, made_up(1)]))
    assert page.read_bytes().isascii() and page.read_text().count("</script>") == 5
    browser.open(page)
    assert browser.run("window.broken === undefined && document.images.length === 0")
    shown = browser.text(".turn .observation")
    assert "</script><script>" in shown and "⟨2028⟩" in shown and "⟨D800⟩" in shown and "⟨202E⟩" in shown
    assert "⟨001B⟩[31m" in shown and "🐢" in shown and browser.texts("#episode .token")[1] == "⟨FEFF⟩"
    browser.hover("#episode .token")
    assert "</script>" in browser.text("#tip")
    browser.click("#episode details summary")
    browser.run("new Promise((then) => setTimeout(then, 100))")  # it is filled when it has opened
    assert "</script>" in browser.text("#episode details")


def test_on_a_narrow_screen_the_list_and_the_episode_take_turns(browser, page):
    browser.open(page, width=390, height=800)
    visible = "['#list', '#episode'].map((one) => document.querySelector(one).offsetHeight > 0)"
    assert browser.run(visible) == [True, False]
    browser.click("#rows tbody tr", 1)
    assert browser.run(visible) == [False, True]
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.press("Escape")
    assert browser.run(visible) == [True, False]


def test_dark_is_dark(browser, page):
    for dark, back in ((False, "rgb(255, 255, 255)"), (True, "rgb(22, 24, 27)")):
        browser.open(page, dark=dark)
        assert browser.run("getComputedStyle(document.body).backgroundColor") == back


# ------------------------------------------------------------------------------------------------- without a browser


def test_runs_of_the_same_name_are_told_apart_and_a_broken_line_is_left_out(tmp_path, caplog):
    runs = [save(tmp_path / name / "run", [made_up(i) for i in range(2)]) for name in ("a", "b")]
    with (runs[0] / "rollouts" / "train_000000.jsonl").open("a") as file:
        file.write('{"half": ')
    first, second = show_rollouts.read_runs(runs)
    assert (first.name, second.name) == ("a/run", "b/run") and len(first.episodes) == 2
    assert "line 3 of" in caplog.text and "left out" in caplog.text


def test_the_command_writes_the_page_or_prints_an_episode(tmp_path, monkeypatch, capsys):
    save(tmp_path, [made_up(0), made_up(1, failure="env_timeout")])
    save(tmp_path, [made_up(2, n=1, turns=6), made_up(4, n=1, turns=3), made_up(5, n=1, turns=2)], "train_000001")

    def call(*options):
        monkeypatch.setattr("sys.argv", ["show_rollouts", str(tmp_path), *options])
        show_rollouts.main()
        return capsys.readouterr().out

    assert call() == f"{tmp_path}/rollouts.html: 5 episodes, 3 won, 1 failed, 1 lost\n"
    assert "made_up" not in (tmp_path / "rollouts.html").read_text()
    assert call("--text").startswith("f2b, train, step 1, depth k = 3: put a clean plate in shelf 2 (4).\n")
    assert call("--text", "train_000000").count("--- prompt") == 2
    assert "env_timeout" in call("--text", "train_000000:2")
    with pytest.raises(SystemExit, match="there is no eval_x: name one of train_000000, train_000001"):
        call("--text", "eval_x")
    monkeypatch.setattr("sys.argv", ["show_rollouts", str(tmp_path / "rollouts")])
    with pytest.raises(SystemExit, match="has no rollouts/.*jsonl: name a run directory"):
        show_rollouts.main()


def test_the_text_shows_every_span_with_its_numbers():
    episode = made_up(0, turns=2, replayed=1)
    episode["turns"][1] |= {"valid": False, "cut": True}
    text = rollout_text(episode)
    count = episode["spans"][3]["count"]
    assert text.startswith(
        "f2b, train, step 0, depth k = 1: put a clean plate in cabinet 1 (0).\n"
        "1 turns replayed, 1 of at most 1 played, won\n"
        "--- prompt, 60 tokens, not trained\n<|im_start|>system"
    )
    assert "--- replayed, turn 1," in text
    kl = f"{episode['turns'][1]['kl']:+.2f}"
    assert (
        f"--- student, turn 2, {count} tokens sampled, KL {kl} nats, no valid format, cut by the length limit" in text
    )
    assert text.endswith(f"trajectory KL {kl} nats\n")
    failed = {**episode, "failure": "env_timeout", "detail": "no reply", "spans": [], "kl": None}
    assert "failed, env_timeout: no reply" in rollout_text(failed) and "--- turn 1, replayed" in rollout_text(failed)
    assert shortest_won([failed, episode]) is episode and shortest_won([failed]) is failed


def test_text_cannot_command_a_terminal():
    shown = printable(f"a\n{HOSTILE}")
    assert "\x1b" not in shown and "\\x1b[31m" in shown and "\\ud800" in shown and "\\u202e" in shown and "🐢" in shown
    shown.encode()
