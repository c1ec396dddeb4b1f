//! The book hangs together: every page has its place, and every link leads somewhere.

use super::pages::{Page, pages, root};
use std::collections::BTreeSet;

#[test]
fn the_summary_lists_every_page_once() {
    let summary = Page::read("docs/SUMMARY.md".into());
    let listed: Vec<String> = summary.links().into_iter().map(|(_, to)| format!("docs/{to}")).collect();
    let there = pages().into_iter().map(|p| p.name);
    let there: BTreeSet<String> = there.filter(|n| n.starts_with("docs/") && n != "docs/SUMMARY.md").collect();
    assert_eq!(listed.iter().cloned().collect::<BTreeSet<_>>(), there);
    assert_eq!(listed.len(), there.len(), "a page is listed twice");
    // The index has the same pages in the same order, with what each is about.
    let index = Page::read("docs/README.md".into());
    let indexed: Vec<String> = index.links().into_iter().map(|(_, to)| format!("docs/{to}")).collect();
    assert_eq!(indexed, listed[1..]);
    assert_eq!(listed[0], "docs/README.md");
}

#[test]
fn every_link_leads_to_a_file_and_to_a_heading_that_is_there() {
    let mut checked = 0;
    let mut wrong = vec![];
    for page in pages().into_iter().chain([Page::read("ARCHITECTURE.md".into())]) {
        let file = root().join(&page.name);
        for (line, to) in page.links() {
            if to.starts_with("https://") || to.starts_with("http://") {
                continue;
            }
            checked += 1;
            let (path, anchor) = to.split_once('#').unwrap_or((&to, ""));
            let target = if path.is_empty() { file.clone() } else { file.parent().unwrap().join(path) };
            let name = || target.canonicalize().ok()?.strip_prefix(root()).ok()?.to_str().map(String::from);
            let known = match name() {
                None => false,
                Some(_) if anchor.is_empty() => true,
                Some(name) => Page::read(name).anchors().iter().any(|a| a == anchor),
            };
            if !known {
                wrong.push(format!("{}:{line}: {to}", page.name));
            }
        }
    }
    assert!(wrong.is_empty(), "links that lead nowhere:\n{}", wrong.join("\n"));
    assert!(checked > 40, "only {checked} links are found");
}
