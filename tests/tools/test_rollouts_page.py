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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs: F2B with 12 episodes of three tasks, three of them failed; B2F with 4, replayed turns among them."""
    folder = tmp_path_factory.mktemp("runs")
    one = [made_up(i, n=i // 3, task=i % 3, turns=2 + i % 4) for i in range(12)]
    for episode in one[::4]:
        episode |= {"failure": "env_timeout", "detail": "no reply in 120 s", "kl": None}
    one[1]["turns"][-1] |= {"cut": True, "valid": False, "refused": True, "action": "go to"}
    two = [made_up(i, n=9, task=5, turns=5, replayed=2, arm="b2f", dataset="unseen", reward=i / 4) for i in range(4)]
    two[3] |= {"context_limited": True, "goal": "boil water, " * 100}
    (folder / "page.html").write_text(
        show_rollouts.make_page(
            show_rollouts.read_runs([save(folder / "f2b-1", one), save(folder / "b2f-1", two, "eval_unseen_000009")])
        )
    )
    return folder / "page.html"


def found(page, script, *options, **more):
    """What the script returns; nothing went wrong, and the page asked for nothing."""
    visited = visit(page, script, *options, **more)
    assert visited["errors"] == [] and visited["requests"] == []
    return visited["found"]


def test_the_list_is_filtered_searched_and_sorted(page):
    seen = found(
        page,
        """
        const seen = { all: texts("#count"), filtered: {} };
        for (const [name, value] of [["outcome", "won"], ["outcome", "failed: env_timeout"], ["arm", "b2f"],
            ["set", "unseen"], ["k", "2"], ["task type", "heat"]]) {
          enter(`select[name="${name}"]`, value);
          seen.filtered[value] = texts("#count")[0].split(":")[0];
          enter(`select[name="${name}"]`, "");
        }
        for (const words of ["FRIDGE", "games/2.tw"]) {
          enter("#search", words);
          seen.filtered[words] = texts("#count")[0].split(":")[0];
        }
        enter("#search", "");
        const kls = () => texts(`#rows td:nth-child(${texts("#head th").findIndex((one) => one.startsWith("KL")) + 1})`);
        for (const way of ["descending", "ascending"]) {
          click("#head th[data-key=kl] button");
          seen[way] = [kls(), document.querySelector("#head th[data-key=kl]").getAttribute("aria-sort")];
        }
        return seen;
        """,
    )
    assert seen["all"] == ["16 of 16 episodes: 5 won, 8 lost, 3 failed"]
    counts = {
        "won": 5,
        "failed: env_timeout": 3,
        "b2f": 4,
        "unseen": 4,
        "2": 3,
        "heat": 4,
        "FRIDGE": 0,
        "games/2.tw": 4,
    }
    assert seen["filtered"] == {name: f"{count} of 16 episodes" for name, count in counts.items()}
    for way in ("descending", "ascending"):
        kls, said = seen[way]
        numbers = [float(kl.replace("−", "-")) for kl in kls if kl]
        assert numbers == sorted(numbers, reverse=way == "descending") and said == way
        assert kls[-3:] == ["", "", ""]  # rows without a number come last


def test_keys_go_through_the_list_and_a_task_is_shown_alone(page):
    seen = found(
        page,
        """
        const at = [location.hash];
        for (const key of ["j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft", "j"]) {
          press(key);
          at.push(location.hash);
        }
        press("t");
        const alone = texts("#count");
        press("j");
        at.push(location.hash);
        press("t");
        return { at, alone, again: texts("#count"),
          selected: document.querySelector("#rows [aria-selected=true]").dataset.id };
        """,
    )
    assert seen["at"] == ["#0", "#1", "#2", "#1", "#0", "#0", "#1", "#4"] and seen["selected"] == "4"
    assert seen["alone"] == ["4 of 16 episodes: 1 won, 2 lost, 1 failed"] and seen["again"][0].startswith("16 of 16")


def test_an_episode_is_a_conversation_with_its_numbers(page):
    seen = found(
        page,
        """
        const seen = { facts: texts("#episode .facts")[0], turns: [...document.querySelectorAll(".turn")].map((one) =>
          one.className), bars: texts(".chart button"), tip: document.querySelector("#episode .token").dataset.tip,
          kl: look("#episode .token", "content", "::after") };
        click("#numbers");
        seen.shown = look("#episode .token", "content", "::after");
        click(".chart button", 3);
        seen.marked = document.querySelector(".turn.marked").id;
        click("#episode summary");
        await pause();
        return { ...seen, whole: texts("#episode pre") };
        """,
        fragment="#13",
    )
    episode = made_up(1, n=9, task=5, turns=5, replayed=2)
    first = episode["turns"][2]
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
    assert float(seen["bars"][2].split()[0].replace("−", "-")) == pytest.approx(first["kl"], abs=0.06)
    kl = first["student"][0] - first["teacher"][0]
    tip = seen["tip"].replace("−", "-").split("\n")
    assert tip[0] == json.dumps(first["tokens"][0]) and tip[3] == f"KL {kl:+.2f} nats"
    assert tip[1].startswith(f"student {first['student'][0]:.3f} nats, probability 0.")
    assert seen["kl"] == "none" and seen["shown"].replace("−", "-") == f'"{kl:+.2f}"'
    assert seen["whole"][4] == first["observation"].join(first["context"]) and seen["whole"][1].endswith("<|im_end|>")


def test_notes_failures_limits_and_long_goals_are_shown(page):
    seen = [
        found(
            page,
            "return Object.fromEntries(['.note', '#episode', '.folded'].map((one) => [one, texts(one)]));",
            fragment=at,
        )
        for at in ("#1", "#0", "#15")
    ]
    assert seen[0][".note"] == ["no valid format", "refused by the environment", "✂ cut by the length limit"]
    assert "! failed: env_timeout" in seen[1]["#episode"][0] and "no reply in 120 s" in seen[1]["#episode"][0]
    assert "The context had no room for a further turn." in seen[2]["#episode"][0]
    assert [text.startswith("boil water, ") for text in seen[2][".folded"]] == [True]


def test_hostile_text_is_text(tmp_path):
    one = made_up(0, turns=2, goal=HOSTILE, task_type=HOSTILE, outcome=HOSTILE)
    one["task"] = json.dumps({"x": HOSTILE})
    one["turns"][0] |= {"observation": HOSTILE, "action": HOSTILE, "tokens": [HOSTILE, "\ufeff"]}
    page = tmp_path / "page.html"
    page.write_text(show_rollouts.make_page(show_rollouts.read_runs([save(tmp_path, [one, made_up(1)])])))
    seen = found(
        page,
        "return [window.broken === undefined, document.images.length, texts('.observation')[0], texts('#episode .token')[1]];",
    )
    assert seen[:2] == [True, 0] and seen[3] == "⟨FEFF⟩"
    for part in ("</script><script>", "⟨2028⟩", "⟨202E⟩", "⟨001B⟩[31m", "🐢", "\\ud800"):
        assert part in seen[2]


def test_a_small_a_dark_and_a_broken_page(page, tmp_path):
    visible = "const visible = () => ['#list', '#episode'].map((one) => document.querySelector(one).offsetHeight > 0);"
    seen = found(
        page,
        f"{visible} const seen = [visible()]; click('#rows tr', 1); seen.push(visible()); press('Escape');"
        " return [...seen, visible(), document.documentElement.scrollWidth <= innerWidth];",
        "--window-size=500,800",
    )
    assert seen == [[True, False], [False, True], [True, False], True]
    looks = "[...document.querySelectorAll('#legend .token')].map((one) => getComputedStyle(one))"
    back, legend = found(
        page,
        f"return [look('body', 'backgroundColor'), {looks}.map((one) => one.borderBottomWidth + one.borderBottomStyle)];",
        "--blink-settings=preferredColorScheme=0",
    )
    assert back == "rgb(22, 24, 27)" and len(set(legend)) == 9  # shades differ without colour, too
    broken = tmp_path / "page.html"
    broken.write_text(page.read_text().replace('"kl":', '"kl":NaN,"x":', 1))
    assert visit(broken, "return texts('#count');")["found"][0].startswith("This page is broken: ")


def test_a_long_list_is_made_as_far_as_it_is_in_view(tmp_path):
    page = tmp_path / "page.html"
    episodes = [made_up(i, turns=1, words=1) for i in range(1000)]
    page.write_text(show_rollouts.make_page(show_rollouts.read_runs([save(tmp_path, episodes)])))
    script = "for (let i = 0; i < 20; i++) await pause(); const seen = [document.querySelectorAll('#rows tr').length];"
    script += "open(index[900]); return [...seen, document.querySelector('#rows [aria-selected=true]').dataset.id];"
    assert [found(page, script, f"--window-size=1280,{height}") for height in (900, 20_000)] == [
        [200, "900"],
        [400, "900"],
    ]
