//! The page of `plan --format html` in a browser: it says nothing on its console, has what it is for, and tells what is under
//! the mouse. Without a browser the tests say so, and pass; `UPDATE_DOCS=1` takes the picture of docs/plan.md anew.

mod chrome;
#[path = "../common/mod.rs"]
mod common;

use chrome::Chrome;
use common::Place;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// A page that a program prints, in a file, and a browser to show it.
fn opened(place: &Place, plan: &str) -> Option<(PathBuf, Chrome)> {
    let Some(browser) = chrome::found() else {
        println!("there is no browser, so nothing is checked: install Chromium, or name one by CHROME");
        return None;
    };
    println!("the browser is {}", browser.display());
    let file = place.path("plan.html");
    fs::write(&file, place.ok(&format!("plan {plan} --format html")).out).unwrap();
    Some((file, Chrome::open(&browser)))
}

/// Points at the middle of the n-th element that a selector finds, and gives what is shown for it.
fn shown(chrome: &mut Chrome, selector: &str, n: usize) -> String {
    let find = format!("document.querySelectorAll('{selector}')[{n}]");
    let middle = chrome.value(&format!(
        "(() => {{ const of = {find}; of.scrollIntoView({{block: 'center', inline: 'center'}}); \
         const box = of.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; }})()"
    ));
    chrome.point(middle[0].as_f64().unwrap(), middle[1].as_f64().unwrap());
    let tip = chrome.value(
        "(() => { const tip = document.getElementById('tip'), box = tip.getBoundingClientRect(); \
         const inside = box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight; \
         return [tip.hidden, inside, tip.textContent]; })()",
    );
    assert_eq!((&tip[0], &tip[1]), (&Value::Bool(false), &Value::Bool(true)), "{selector}: {tip}");
    tip[2].as_str().unwrap().to_string()
}

const UNET: &str = "--data phantom --size 64 --machine h100x8 --mesh x=2,y=2,z=2";

#[test]
fn the_page_of_a_unet_shows_all_that_it_is_for_and_tells_why() {
    let place = Place::new();
    let Some((file, mut chrome)) = opened(&place, UNET) else { return };
    chrome.show(&file, 1300, 900);
    let headings = chrome.value("[...document.querySelectorAll('h3')].map(h => h.textContent).join('; ')");
    for part in
        ["Findings", "Tensors on the mesh", "Levels", "Memory over the steps", "Communication, by axes", "Time on"]
    {
        assert!(headings.as_str().unwrap().contains(part), "no {part} in {headings}");
    }
    let count =
        |chrome: &mut Chrome, selector: &str| chrome.value(&format!("document.querySelectorAll('{selector}').length"));
    assert_eq!(count(&mut chrome, "svg.mesh g"), 8);
    let levels = count(&mut chrome, "svg.levels g");
    assert_eq!(levels, chrome.value("report.plans[0].levels.length"));
    // Levels stand in a U: the deepest one lowest, the first and the last at one height.
    let at = "[...document.querySelectorAll('svg.levels g')].map(g => g.getBoundingClientRect().top)";
    let tops: Vec<f64> = serde_json::from_value(chrome.value(at)).unwrap();
    let deepest = (0..tops.len()).max_by(|a, b| tops[*a].total_cmp(&tops[*b])).unwrap();
    assert_eq!(chrome.value(&format!("report.plans[0].levels[{deepest}].name")), "encoder.3");
    chrome.value("document.querySelector('details').open = true");
    for (selector, n, texts) in [
        ("svg.mesh g", 7, vec!["devices 7", "image [batch:0..1, x:32..64, y:32..64, z:32..64", "by the rule `y:y`"]),
        (
            "svg.levels g",
            0,
            vec!["encoder.0", "lies x:x,y:y,z:z", "`x` is split over x by the rule `x:x`", "for halos"],
        ),
        ("svg.levels g", deepest, vec!["encoder.3", "`z` is split over z by the rule `z:z`"]),
        ("svg.memory", 0, vec!["step ", " alive, of which", "variables"]),
        ("details tr[data-tip]", 0, vec!["lies whole", "no rule is about its dimensions"]),
        (".track i", 0, vec!["along x", "messages of all devices"]),
    ] {
        let tip = shown(&mut chrome, selector, n);
        texts.iter().for_each(|text| assert!(tip.contains(text), "{selector} {n} does not say `{text}`: {tip}"));
    }
    let times =
        chrome.value("[...document.querySelectorAll('.track i')].findIndex(i => i.dataset.tip.includes('computing'))");
    assert!(shown(&mut chrome, ".track i", times.as_u64().unwrap() as usize).starts_with("computing "));
    // What is under the mouse changes along the memory's steps; beside it all nothing is shown.
    let middle = shown(&mut chrome, "svg.memory", 0);
    let left = chrome.value("document.querySelector('svg.memory').getBoundingClientRect().left + 3");
    let top = chrome.value("document.querySelector('svg.memory').getBoundingClientRect().top + 20");
    chrome.point(left.as_f64().unwrap(), top.as_f64().unwrap());
    let first = chrome.value("document.getElementById('tip').textContent");
    assert!(first.as_str().unwrap().starts_with("step ") && first != middle.as_str(), "{first}");
    chrome.point(1.0, 1.0);
    assert_eq!(chrome.value("document.getElementById('tip').hidden"), true);
    // On a telephone only pictures and tables are wider than the window, each by itself.
    chrome.size(380, 800);
    assert_eq!(chrome.value("document.documentElement.scrollWidth"), 380);
    assert!(shown(&mut chrome, "svg.levels g", 3).contains("encoder.3"));
    assert_eq!(chrome.said, Vec::<String>::new());
}

#[test]
fn the_page_of_a_program_of_stages_has_both_and_says_which_rule_gives_way() {
    let place = Place::of(env!("CARGO_BIN_EXE_bert"));
    let plan = "--size 2x64x2 --seq 32 --batch 16 --method share-unshare --mesh data=2,model=2 \
                --layout batch:data,d_ff:model,heads:model,seq:model?";
    let Some((file, mut chrome)) = opened(&place, plan) else { return };
    chrome.show(&file, 1000, 800);
    assert_eq!(chrome.value("document.querySelectorAll('section').length"), 2);
    let ways = chrome.value("[...document.querySelectorAll('[data-tip]')].map(e => e.dataset.tip).filter(t => t.includes('gives way')).length");
    assert!(ways.as_u64().unwrap() > 0, "{ways}");
    assert!(shown(&mut chrome, "svg.levels g", 1).contains("lies "));
    assert_eq!(chrome.said, Vec::<String>::new());
}

#[test]
fn what_a_page_says_on_its_console_is_noticed() {
    let place = Place::new();
    let Some((file, mut chrome)) = opened(&place, UNET) else { return };
    let page = fs::read_to_string(&file).unwrap();
    for (wrong, says) in [("undefined.wrong", "TypeError"), ("console.error('told')", "told")] {
        fs::write(&file, page.replace("\"use strict\";", &format!("\"use strict\"; {wrong};"))).unwrap();
        chrome.show(&file, 800, 600);
        assert!(chrome.said.iter().any(|said| said.contains(says)), "{wrong}: {:?}", chrome.said);
    }
}

#[test]
fn the_picture_in_the_book_is_of_such_a_page() {
    let place = Place::new();
    let Some((file, mut chrome)) = opened(&place, "--data phantom --size 256 --base 32 --machine h100x8") else {
        return;
    };
    chrome.show(&file, 1160, 900);
    let length = chrome.value("document.documentElement.scrollHeight").as_u64().unwrap();
    chrome.size(1160, length as u32);
    let picture = chrome.picture();
    let image = image::load_from_memory(&picture).unwrap();
    assert!(image.width() == 1160 && image.height() > 1500, "{} x {}", image.width(), image.height());
    let book = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/images/plan.png");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        // In a window as long as the page what is shown for a level stands beside it.
        shown(&mut chrome, "svg.levels g", 3);
        fs::write(book, chrome.picture()).unwrap();
    }
    // The same page, on whatever browser: as wide, and about as long.
    let kept = image::open(book).unwrap();
    let longer = f64::from(kept.height()) / f64::from(image.height());
    assert!(kept.width() == image.width() && (0.8..1.25).contains(&longer), "docs/images/plan.png is of another page");
}
