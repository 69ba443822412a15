"""The page of saved episodes in a real browser."""

import json

import pytest

from examples.tcod.tools import show_rollouts
from tests.support.browser import find_browser, visit
from tests.support.episodes import HOSTILE, made_up, save

NUM_GPUS = 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_browser(), reason="no Chromium to try the page in: on Debian, apt-get install chromium"
    ),
]


def page_of(folder, *runs):
    path = folder / "page.html"
    path.write_text(show_rollouts.make_page(show_rollouts.read_runs(runs)))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs: F2B with 12 episodes of three tasks, three of them failed; B2F with 4, replayed turns among them."""
    folder = tmp_path_factory.mktemp("runs")
    one = [made_up(i, n=i // 3, task=i % 3, turns=2 + i % 4) for i in range(12)]
    for episode in one[::4]:
        episode |= {"failure": "env_timeout", "detail": "no reply in 120 s", "kl": None}
    for turn in one[8]["turns"]:  # it failed midway: nothing else is known of its turns
        for name in ("context", "context_tokens", "tokens", "student", "teacher", "response_tokens"):
            del turn[name]
    one[1]["turns"][-1] |= {"cut": True, "valid": False, "refused": True, "action": "go to"}
    two = [made_up(i, n=9, task=5, turns=5, replayed=2, arm="b2f", dataset="unseen", reward=i / 4) for i in range(4)]
    note = {"text": ["A note.", HOSTILE], "tokens": 9, "left_out": 2}
    one[5] |= {"note": note, "turns": [{**turn, "plain": [-3.0] * 4} for turn in one[5]["turns"]]}
    two[3] |= {"context_limited": True, "goal": "boil water, " * 100}
    return page_of(folder, save(folder / "f2b-1", one), save(folder / "b2f-1", two, "eval_unseen_000009"))


def found(page, script, *options, **more):
    """What the script returns; nothing went wrong, and the page asked for nothing."""
    visited = visit(page, script, *options, **more)
    assert visited["errors"] == [] and visited["requests"] == []
    return visited["found"]


def test_the_list_is_filtered_searched_and_sorted(page):
    seen = found(
        page,
        """
        const counts = [], kls = {}, kl = "#head th[data-key=kl]";
        for (const [field, value] of [["select[name=outcome]", "failed: env_timeout"], ["select[name=arm]", "b2f"],
            ["#search", "games/2.TW"]]) {
          enter(field, value);
          counts.push(texts("#count")[0]);
          enter(field, "");
        }
        const place = [...document.querySelectorAll("#head th")].indexOf(document.querySelector(kl)) + 1;
        for (const clicks of [1, 2]) {
          click(kl + " button");
          kls[document.querySelector(kl).getAttribute("aria-sort")] = texts(`#rows td:nth-child(${place})`);
        }
        return { counts, kls };
        """,
    )
    assert seen["counts"] == [
        "3 of 16 episodes: 0 won, 0 lost, 3 failed",
        "4 of 16 episodes: 2 won, 2 lost, 0 failed",
        "4 of 16 episodes: 1 won, 2 lost, 1 failed",
    ]
    for way in ("descending", "ascending"):
        numbers = [float(kl.replace("−", "-")) for kl in seen["kls"][way] if kl]
        assert numbers == sorted(numbers, reverse=way == "descending")
        assert seen["kls"][way][-3:] == ["", "", ""]  # rows without a number come last


def test_keys_go_through_the_list_and_a_task_is_shown_alone(page):
    script = """
        const at = [location.hash];
        for (const key of ["j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft", "j", "t", "j"]) {
          press(key);
          at.push(location.hash);
        }
        const alone = texts("#count")[0];
        press("t");
        return [at, alone, texts("#count")[0]];
        """
    at, alone, again = found(page, script)
    assert at == ["#0", "#1", "#2", "#1", "#0", "#0", "#1", "#1", "#4"]
    assert alone == "4 of 16 episodes: 1 won, 2 lost, 1 failed" and again.startswith("16 of 16")


def test_an_episode_is_a_conversation_with_its_numbers(page):
    seen = found(
        page,
        """
        const first = "#episode .token", seen = { facts: texts("#episode .facts")[0], bars: texts(".chart button") };
        seen.turns = [...document.querySelectorAll(".turn")].map((one) => one.className);
        seen.tip = document.querySelector(first).dataset.tip;
        seen.kl = [look(first, "content", "::after")];
        click("#numbers");
        seen.kl.push(look(first, "content", "::after"));
        click(".chart button", 3);
        seen.marked = document.querySelector(".turn.marked").id;
        click("#episode summary");
        await pause();
        return { ...seen, whole: texts("#episode pre") };
        """,
        fragment="#13",
    )
    played = made_up(1, n=9, task=5, turns=5, replayed=2)["turns"][2]
    for fact in (
        "✗ lost",
        "evaluation on unseen",
        "step 9",
        "2 turns replayed",
        "reward 0.25",
        "eval_unseen_000009:2",
    ):
        assert fact in seen["facts"]
    assert seen["turns"] == ["turn replayed"] * 2 + ["turn student"] * 3 and seen["marked"] == "turn-3"
    assert float(seen["bars"][2].split()[0].replace("−", "-")) == pytest.approx(played["kl"], abs=0.06)
    kl = f"{played['student'][0] - played['teacher'][0]:+.2f}"
    word, student, _, tip = seen["tip"].replace("−", "-").split("\n")
    assert (word, tip) == (json.dumps(played["tokens"][0]), f"KL {kl} nats")
    assert student.startswith(f"student {played['student'][0]:.3f} nats, probability 0.")
    assert [one.replace("−", "-") for one in seen["kl"]] == ["none", f'"{kl}"']
    assert seen["whole"][4] == played["observation"].join(played["context"])


def test_notes_failures_limits_and_long_goals_are_shown(page):
    script = "return [texts('.note'), texts('#episode')[0], texts('.folded').map((text) => text.slice(0, 10))];"
    notes, failed, limited, midway = (found(page, script, fragment=fragment) for fragment in ("#1", "#0", "#15", "#8"))
    assert "! failed: env_timeout" in midway[1] and "go to " in midway[1]
    assert notes[0] == ["no valid format", "refused by the environment", "✂ cut by the length limit"]
    assert "! failed: env_timeout" in failed[1] and "no reply in 120 s" in failed[1]
    assert "The context had no room for a further turn." in limited[1] and limited[2] == ["boil water"]


def test_hostile_text_is_text(tmp_path):
    hostile = made_up(0, turns=2, goal=HOSTILE, task_type=HOSTILE, outcome=HOSTILE)
    hostile["turns"][0] |= {"observation": HOSTILE, "action": HOSTILE, "tokens": [HOSTILE, "\ufeff"]}
    script = "return [window.broken, document.images.length, texts('#episode .token')[1], texts('.observation')[0]];"
    *seen, shown = found(page_of(tmp_path, save(tmp_path, [hostile, made_up(1)])), script)
    assert seen == [None, 0, "⟨FEFF⟩"]
    assert all(part in shown for part in ("</script><script>", "⟨2028⟩", "⟨202E⟩", "⟨001B⟩[31m", "🐢", " ? "))


def test_a_small_a_dark_and_a_broken_page(page, tmp_path):
    script = "const seen = () => ['#list', '#episode'].map((one) => document.querySelector(one).offsetHeight > 0);"
    script += "const all = [seen()]; click('#rows tr', 1); all.push(seen()); press('Escape'); return [...all, seen()];"
    assert found(page, script, "--window-size=500,800") == [[True, False], [False, True], [True, False]]
    script = (
        "return ['body', ...['l4', 'l3', 'l2', 'l1', 'h1', 'h2', 'h3', 'h4'].map((one) => '#legend .' + one)].map("
    )
    script += (
        "(one) => [look(one, 'backgroundColor'), look(one, 'borderBottomWidth'), look(one, 'borderBottomStyle')]);"
    )
    body, *legend = found(page, script, "--blink-settings=preferredColorScheme=0")
    assert body[0] == "rgb(22, 24, 27)" and len({tuple(look[1:]) for look in legend}) == 8  # without colour, too
    broken = tmp_path / "page.html"
    broken.write_text(page.read_text().replace('"kl":', '"kl":NaN,"x":', 1))
    assert visit(broken, "return texts('#count');")["found"][0].startswith("This page is broken: ")


def test_a_long_list_is_made_as_far_as_it_is_in_view(tmp_path):
    page = page_of(tmp_path, save(tmp_path, [made_up(i, turns=1) for i in range(1000)]))
    script = "const made = () => document.querySelectorAll('#rows tr').length;"
    script += "for (let i = 0; i < 20 || (made() < %d && i < 500); i++) await pause(); const seen = made();"
    script += "open(index[900]); return [seen, document.querySelector('#rows [aria-selected=true]').dataset.id];"
    assert found(page, script % 200) == [200, "900"]
    assert found(page, script % 400, "--window-size=1280,20000") == [400, "900"]


def test_the_teachers_note_is_folded_and_tokens_show_what_it_changed(page):
    script = """
        const numbers = () => [...document.querySelectorAll(".token[data-kl]")].map((token) => token.dataset.kl);
        const kls = numbers(), box = document.querySelector("#note"), open = box.open;
        const note = box.querySelector("pre").textContent;
        click("#note button");
        return [open, texts("#note summary")[0], note, kls, numbers(), document.querySelector("#note").open];
    """
    is_open, title, note, kls, effects, stays_open = found(page, script, fragment="#5")
    assert not is_open and stays_open and title == "The teacher's note, 9 tokens, 2 parts left out"
    assert note.startswith("A note.\n</script><script>window.broken = 1")
    turns = made_up(5, n=1, task=2, turns=3)["turns"]
    pairs = [pair for turn in turns for pair in zip(turn["student"], turn["teacher"], strict=True)]
    numbers = [[float(number.replace("\u2212", "-")) for number in numbers] for numbers in (kls, effects)]
    expected = [[student - teacher for student, teacher in pairs], [teacher + 3 for _, teacher in pairs]]
    assert numbers == [pytest.approx(values, abs=0.0051) for values in expected]
    script = (
        "click('#note button'); open(index[6]); return ['#note', '[data-kl]'].map((one) => texts(one).length > 0);"
    )
    assert found(page, script, fragment="#5") == [False, True]  # an episode without a note keeps its colours
