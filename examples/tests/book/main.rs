//! The book is true: every command of its pages runs, every block of Rust is compiled and run, every layout and
//! configuration is read by what reads them, every text that is shown is printed; and it hangs together.
//!
//! What cannot be run here, or is made shorter, stands in [`table`] with the reason. A block of which nothing is said there,
//! and of a kind that is not known, fails.

mod code;
mod links;
mod pages;
mod place;
mod table;

use pages::{Block, Page, pages, root};
use place::Place;
use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use table::{AFTER, BEFORE, COMMANDS, How, PLACES, SHOWN, Shown};

/// Blocks that are run at a time.
const AT_A_TIME: usize = 2;
/// What makes commands short has names in the table, which may stand in what comes before a block.
const NAMES: [(&str, &str); 2] = [("$UNET", table::UNET), ("$BERT", table::BERT)];

/// The lines of a script, those that go on joined.
fn joined(text: &str) -> Vec<String> {
    let text = text.replace("\\\n", " ");
    text.lines().map(|l| l.trim().to_string()).filter(|l| !l.is_empty() && !l.starts_with('#')).collect()
}

/// The commands of a script: lines, a loop being one.
fn commands(text: &str) -> Vec<String> {
    let mut commands: Vec<String> = vec![];
    for line in joined(text) {
        match commands.last_mut() {
            Some(open) if open.starts_with("for ") && !open.ends_with("done") => *open += &format!("\n{line}"),
            _ => commands.push(line),
        }
    }
    commands
}

/// A command of a page with the names of the programs here, and its entry in the table.
fn ruled(page: &str, command: &str) -> (String, Option<usize>) {
    let command = PLACES[..table::PROGRAMS].iter().fold(command.to_string(), |c, (from, to, _)| c.replace(from, to));
    let fits = |(of, begins, ..): &table::Rule| (of.is_empty() || *of == page) && command.starts_with(begins);
    let found = COMMANDS.iter().position(fits);
    (command, found)
}

/// How a command of a page is run here: no line, or some.
fn lines(place: &Place, page: &str, command: &str) -> Vec<String> {
    let (command, found) = ruled(page, command);
    let lines = match found.map(|i| &COMMANDS[i].2) {
        None => vec![command],
        Some(How::Not) => vec![],
        Some(How::As(other)) => vec![other.to_string()],
        Some(How::Times(n)) => vec![command; *n],
        Some(How::With(words)) => {
            let end = command.match_indices(' ').nth(1).map_or(command.len(), |(at, _)| at);
            vec![format!("{} {words}{}", &command[..end], &command[end..])]
        }
    };
    lines.iter().map(|l| place.here(l)).collect()
}

/// The entry of a table for what comes before or after a block.
fn beside(table: &[(&str, &str, &str)], block: &Block) -> Option<usize> {
    table.iter().position(|(page, begins, _)| *page == block.page && block.text.starts_with(begins))
}

/// Its lines.
fn around(place: &Place, table: &[(&str, &str, &str)], block: &Block) -> Vec<String> {
    beside(table, block).map_or(vec![], |i| named(place, table[i].2))
}

/// Lines of a table, with what its names stand for.
fn named(place: &Place, lines: &str) -> Vec<String> {
    let lines = NAMES.iter().fold(lines.to_string(), |lines, (name, words)| lines.replace(name, words));
    lines.lines().map(|l| place.here(l)).collect()
}

/// The entry of the table for a block that is no script.
fn told(block: &Block) -> Option<usize> {
    SHOWN.iter().position(|(page, kind, begins, _)| {
        *page == block.page && *kind == block.kind && block.text.starts_with(begins)
    })
}

/// Runs a script of a page.
fn script(block: &Block) -> Result<(), String> {
    let place = Place::new();
    let mut all = around(&place, BEFORE, block);
    all.extend(commands(&block.text).iter().flat_map(|c| lines(&place, &block.page, c)));
    all.extend(around(&place, AFTER, block));
    place.run(&all).map(drop)
}

/// A text with numbers and units as marks, and one space between words.
fn marked(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_whitespace() {
        let mut word_out = String::new();
        let mut number = false;
        for c in word.chars() {
            let goes_on = number && (c.is_ascii_digit() || c == '.' || c == ',');
            if c.is_ascii_digit() && !number {
                word_out.push('#');
            }
            number = c.is_ascii_digit() || goes_on;
            if !number {
                word_out.push(c);
            }
        }
        let unit = ["KiB", "MiB", "GiB"].iter().any(|u| word_out == *u);
        out += if unit { "bytes" } else { &word_out };
        out.push(' ');
    }
    out.trim_end().to_string()
}

/// Lines of a block that a text does not have, as whole words; `..` in a line stands for anything.
fn missing<'a>(block: &'a str, printed: &str) -> Vec<&'a str> {
    let printed: Vec<String> = printed.lines().map(|l| format!(" {} ", marked(l))).collect();
    let has = |line: &&str| {
        let pieces = line.split("..").map(marked).filter(|p| !p.is_empty());
        let pieces: Vec<String> = pieces.map(|p| format!(" {p} ")).collect();
        printed.iter().any(|p| {
            let mut rest = p.as_str();
            // The space behind a piece may be the one before the next.
            let mut next = |piece: &String| rest.find(piece.as_str()).map(|at| rest = &rest[at + piece.len() - 1..]);
            pieces.iter().all(|piece| next(piece).is_some())
        })
    };
    block.lines().filter(|line| !has(line)).collect()
}

/// Holds a block that is no script to what the table says of it.
fn shown(block: &Block) -> Result<(), String> {
    let Some(i) = told(block) else {
        return Err(
            "it is in no table of examples/tests/book/table.rs, so that nothing holds it to what it says".into()
        );
    };
    let run = |place: &Place, lines: &str| place.run(&named(place, lines));
    let place = Place::new();
    match &SHOWN[i].3 {
        Shown::By(test) => {
            let text = fs::read_to_string(root().join(test)).map_err(|e| format!("{test}: {e}"))?;
            if text.contains(&block.page) { Ok(()) } else { Err(format!("{test} does not read {}", block.page)) }
        }
        Shown::Not(_) => Ok(()),
        Shown::Printed(lines, chance) => {
            let printed = run(&place, lines)?;
            let text = chance.iter().fold(block.text.clone(), |text, words| text.replace(words, ".."));
            match missing(&text, &printed).as_slice() {
                [] => Ok(()),
                lines => Err(format!("not printed:\n{}\n--- what is\n{printed}", lines.join("\n"))),
            }
        }
        Shown::Layout(lines) => {
            let key = |key: &str| {
                let line = block.text.lines().find_map(|l| l.strip_prefix(key));
                line.map(str::trim).ok_or(format!("it has no {key}"))
            };
            let (mesh, layout) = (key("mesh")?, key("layout")?);
            mesh.parse::<mesh::layout::Mesh>().map_err(|e| e.to_string())?;
            layout.parse::<mesh::layout::Layout>().map_err(|e| e.to_string())?;
            run(&place, &format!("MESH='{mesh}'; LAYOUT='{layout}'\n{lines}")).map(drop)
        }
        Shown::Config(lines) => {
            fs::write(place.path("block.toml"), place.here(&block.text)).unwrap();
            run(&place, lines).map(drop)
        }
        Shown::Files(lines) => {
            run(&place, lines)?;
            let names = block.text.lines().filter_map(|l| l.split_whitespace().next());
            let mut made = vec![];
            walk(&place.path("made"), &mut made);
            let missing: Vec<&str> = names.filter(|n| !made.iter().any(|m| marked(m) == marked(last(n)))).collect();
            if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?} are not among {made:?}")) }
        }
    }
}

/// The last part of a path.
fn last(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// The names of all that is below a folder.
fn walk(folder: &std::path::Path, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        names.push(entry.file_name().to_string_lossy().into_owned());
        if entry.path().is_dir() {
            walk(&entry.path(), names);
        }
    }
}

#[test]
fn every_block_of_the_book_is_run() {
    let only = std::env::var("BOOK_PAGE").unwrap_or_default();
    let blocks = pages().into_iter().flat_map(|p| p.blocks()).filter(|b| b.page.contains(&only));
    let queue: Mutex<VecDeque<Block>> = Mutex::new(blocks.collect());
    let (all, begun) = (queue.lock().unwrap().len(), Instant::now());
    let wrong: Mutex<Vec<String>> = Mutex::default();
    let took: Mutex<Vec<(Duration, String)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(block) = { queue.lock().unwrap().pop_front() } {
                    let begun = Instant::now();
                    let result = match block.kind.as_str() {
                        "sh" => script(&block),
                        "rust" => code::compiled(&block.text),
                        _ => shown(&block),
                    };
                    let name = format!("{}:{} ({})", block.page, block.line, block.kind);
                    result.unwrap_or_else(|why| wrong.lock().unwrap().push(format!("{name}: {why}")));
                    took.lock().unwrap().push((begun.elapsed(), name));
                }
            });
        }
    });
    let (wrong, mut took) = (wrong.into_inner().unwrap(), took.into_inner().unwrap());
    took.sort_by(|a, b| b.cmp(a));
    println!("{all} blocks in {:.1?}; the longest: {:.1?}", begun.elapsed(), &took[..took.len().min(8)]);
    assert!(wrong.is_empty(), "{} of {all} blocks are wrong:\n\n{}", wrong.len(), wrong.join("\n\n"));
}

#[test]
fn the_tables_have_no_entry_that_fits_nothing_and_what_is_not_run_is_said() {
    let mut used: BTreeSet<(&str, usize)> = BTreeSet::new();
    for block in pages().iter().flat_map(|p| p.blocks()) {
        let at = format!("{}:{}", block.page, block.line);
        if block.kind != "sh" {
            used.extend(told(&block).map(|i| ("shown", i)));
            if let Some(Shown::Not(why)) = told(&block).map(|i| &SHOWN[i].3) {
                println!("not run: {at}: {why}");
            }
            continue;
        }
        used.extend(beside(BEFORE, &block).map(|i| ("before", i)));
        used.extend(beside(AFTER, &block).map(|i| ("after", i)));
        for (command, rule) in commands(&block.text).iter().map(|c| ruled(&block.page, c)) {
            used.extend(rule.map(|i| ("command", i)));
            if let Some((.., How::Not, why)) = rule.map(|i| &COMMANDS[i]) {
                println!("not run: {at}: {}: {why}", command.lines().next().unwrap_or_default());
            }
        }
    }
    let tables =
        [("command", COMMANDS.len()), ("before", BEFORE.len()), ("after", AFTER.len()), ("shown", SHOWN.len())];
    let all = tables.iter().flat_map(|(name, n)| (0..*n).map(move |i| (*name, i)));
    let unused: Vec<_> = all.filter(|entry| !used.contains(entry)).collect();
    assert!(unused.is_empty(), "entries of the tables that fit nothing: {unused:?}");
}

#[test]
fn what_is_not_so_is_noticed() {
    let block =
        |page: &str, kind: &str, text: &str| Block { page: page.into(), line: 1, kind: kind.into(), text: text.into() };
    // A command that fails, one that there is not, a service that ends, an option that there is not.
    for wrong in ["false", "unet4d plan", "coordinator --listen 127.0.0.1:99999999", "unet3d plan --sise 3"] {
        assert!(script(&block("docs/x.md", "sh", wrong)).is_err(), "{wrong}");
    }
    assert!(script(&block("docs/x.md", "sh", "unet3d explain L0301  # one that is right\ntrue && \\\n  true")).is_ok());
    assert!(code::compiled("let nothing = of(the_kind);").is_err());
    assert_eq!(missing("a 3.5 MiB\nb .. d\ne", "x a 12 KiB\nb c d"), ["e"]);
    // A block of a kind, or of a page, of which no table says anything; a layout that is none.
    for (page, kind, text) in [
        ("docs/layouts.md", "yaml", "a: 1"),
        ("docs/text.md", "text", "a"),
        ("docs/layouts.md", "text", "mesh    pipe=2\nlayout  @pipe"),
        ("docs/plan.md", "text", "warning[L0501]: something else"),
        ("docs/processes.md", "toml", "lissten = \"127.0.0.1:7070\""),
        ("docs/recovery.md", "text", "checkpoints/\n    other.json"),
    ] {
        assert!(shown(&block(page, kind, text)).is_err(), "{page} {kind}");
    }
    let page = Page { name: "x.md".into(), text: "# A b's `c`\n[x](y.md#z) `[no](link)`\n# A b's c\n".into() };
    assert_eq!((page.anchors(), page.links()), (vec!["a-bs-c".into(), "a-bs-c-1".into()], vec![(2, "y.md#z".into())]));
}
