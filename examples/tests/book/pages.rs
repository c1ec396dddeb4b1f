//! The book's pages: their blocks, headings and links.

use std::fs;
use std::path::{Path, PathBuf};

/// The project's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// A page: its path in the project, and its text.
pub struct Page {
    pub name: String,
    pub text: String,
}

/// A fenced block of a page.
pub struct Block {
    pub page: String,
    pub line: usize,
    /// What stands behind the fence: `sh`, `toml`.
    pub kind: String,
    pub text: String,
}

/// README.md, and every page of the book.
pub fn pages() -> Vec<Page> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = docs.filter(|n| n.ends_with(".md")).map(|n| format!("docs/{n}")).collect();
    names.push("README.md".into());
    names.sort();
    names.into_iter().map(Page::read).collect()
}

impl Page {
    pub fn read(name: String) -> Page {
        let text = fs::read_to_string(root().join(&name)).unwrap();
        Page { name, text }
    }

    /// Lines outside of blocks, each with its number, and the blocks.
    fn parts(&self) -> (Vec<(usize, &str)>, Vec<Block>) {
        let (mut lines, mut blocks, mut open) = (vec![], vec![], None::<Block>);
        for (i, line) in self.text.lines().enumerate() {
            match (line.strip_prefix("```"), open.take()) {
                (Some(kind), None) => {
                    let kind = kind.trim().to_string();
                    open = Some(Block { page: self.name.clone(), line: i + 1, kind, text: String::new() });
                }
                (Some(""), Some(block)) => blocks.push(block),
                (_, Some(mut block)) => {
                    block.text += line;
                    block.text.push('\n');
                    open = Some(block);
                }
                (None, None) => lines.push((i + 1, line)),
            }
        }
        assert!(open.is_none(), "{}: a block has no end", self.name);
        (lines, blocks)
    }

    pub fn blocks(&self) -> Vec<Block> {
        self.parts().1
    }

    /// What a link to a heading has behind `#`: as mdBook and GitHub make it.
    pub fn anchors(&self) -> Vec<String> {
        let mut anchors: Vec<String> = vec![];
        for (_, line) in self.parts().0 {
            let Some(heading) = line.starts_with('#').then(|| line.trim_start_matches('#').trim()) else { continue };
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            let id = kept.collect::<String>().to_lowercase().replace(' ', "-");
            let again = anchors.iter().filter(|a| **a == id).count();
            anchors.push(if again > 0 { format!("{id}-{again}") } else { id });
        }
        anchors
    }

    /// Where links and pictures outside of blocks lead, each with its line.
    pub fn links(&self) -> Vec<(usize, String)> {
        let mut links = vec![];
        for (n, line) in self.parts().0 {
            // What stands between backquotes is no link.
            let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("_");
            links.extend(prose.split("](").skip(1).filter_map(|l| Some((n, l.split_once(')')?.0.to_string()))));
        }
        links
    }
}
