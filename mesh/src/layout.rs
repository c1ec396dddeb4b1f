//! Meshes and the language of layouts: rules that say which dimension is split over which axes of a mesh.
//!
//! ```text
//! layout  = { (rule | block) [","|";"|newline] }
//! rule    = dimension ":" axes                      batch:data    d_ff:x+y    heads:model?    x:none    *:data
//!         | "@" axis ":" (number | "none")          @pipe:0
//!         | "schedule:" ("gpipe" | "1f1b" | "zero-bubble"), in no block
//!         | "gathers:" ("allow" | "refuse"), in no block
//! axes    = "none" | split ["?"] | "ring(" split ")"                                          memory_seq:ring(sp)
//! split   = axis { "+" axis }
//! block   = (section | pattern) "{" layout "}"      slots{ *:data }    decoder/**{ x:none, channel:model }
//! section = "variables" | "gradients" | "slots" | "activations"
//! ```
//!
//! A scope's pattern is a path whose parts may hold `*` (any text) or be `**` (any number of parts); it may begin with `/`,
//! as it must for a module that is called like a section. Scopes may stand in a section, and no other block in a block. The same in TOML is a table: rules are `dimension = "axes"`, blocks are tables.
//! `@pipe:0` is a stage of a pipeline: what it is for lies on the devices at that place along the axis, and only there; `schedule` says in which order stages work ([`crate::pipeline`]).
//! `ring(sp)` is `sp?`, and what is split so is not gathered for a product: its blocks go round ([`crate::spmd`]).
//! `gathers` says whether what is split may be gathered whole although no rule asks for it ([`crate::gathers`]).
//! What the rules mean for a tensor is [`crate::placement`]'s.

use crate::dim::{Name, is_name};
use crate::error::{Cause, Error};
use crate::gathers::Gathers;
use crate::pipeline::Schedule;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A mesh of devices: named axes with sizes, `x=2, y=2`. Devices are numbered row-major, the last axis fastest. A mesh
/// without axes is a single device.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Mesh {
    axes: Vec<(Name, usize)>,
}

impl Mesh {
    /// A single device.
    pub fn single() -> Mesh {
        Mesh::default()
    }
    /// The axes in order.
    pub fn axes(&self) -> &[(Name, usize)] {
        &self.axes
    }
    /// Number of devices.
    pub fn size(&self) -> usize {
        self.axes.iter().map(|(_, s)| s).product()
    }
    /// Index of the axis of that name.
    pub fn axis(&self, name: &str) -> Option<usize> {
        self.axes.iter().position(|(n, _)| *n == name)
    }
    /// This mesh with an axis of another size; without it, if that is None.
    pub(crate) fn resized(&self, axis: &str, size: Option<usize>) -> Mesh {
        let resize = |(name, old): &(Name, usize)| Some((name.clone(), if *name == axis { size? } else { *old }));
        Mesh { axes: self.axes.iter().filter_map(resize).collect() }
    }
    /// This mesh once at each of `size` places along an axis, the outermost one.
    pub(crate) fn along(&self, axis: &str, size: usize) -> Mesh {
        Mesh { axes: [&[(Name::from(axis), size)], self.axes.as_slice()].concat() }
    }
    /// Where a device lies along each axis.
    pub fn coordinates(&self, device: usize) -> Vec<usize> {
        let mut rest = device;
        let mut at: Vec<usize> = self
            .axes
            .iter()
            .rev()
            .map(|(_, s)| {
                let c = rest % s;
                rest /= s;
                c
            })
            .collect();
        at.reverse();
        at
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.axes.is_empty() {
            return f.write_str("1");
        }
        for (i, (n, s)) in self.axes.iter().enumerate() {
            write!(f, "{}{n}={s}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// An error in a part of a text, which it shows.
fn inside(e: Error, what: &str, text: &str, part: &str) -> Error {
    if text.trim() == part.trim() { e } else { e.note(format!("in the {what} `{}`", text.trim())) }
}

impl FromStr for Mesh {
    type Err = Error;
    fn from_str(text: &str) -> Result<Mesh, Error> {
        let syntax = |part: &str| {
            let expected = "an axis with its size, such as `x=2` in `data=2, x=2`".into();
            inside(Cause::Syntax { text: part.trim().into(), expected }.into(), "mesh", text, part)
        };
        let mut axes: Vec<(Name, usize)> = Vec::new();
        if matches!(text.trim(), "" | "1") {
            return Ok(Mesh { axes });
        }
        for part in text.split(',') {
            let (name, size) = part.split_once('=').ok_or_else(|| syntax(part))?;
            let (name, size) = (name.trim(), size.trim().parse::<usize>().map_err(|_| syntax(part))?);
            if !is_name(name) || name == NONE || size == 0 || size > 1 << 20 {
                return Err(syntax(part));
            }
            if axes.iter().any(|(n, _)| *n == name) {
                return Err(inside(
                    Cause::TwiceNamed { what: "mesh axes", name: name.into() }.into(),
                    "mesh",
                    text,
                    part,
                ));
            }
            axes.push((name.into(), size));
        }
        if axes.iter().try_fold(1usize, |p, (_, s)| p.checked_mul(*s)).is_none_or(|p| p > 1 << 20) {
            return Err(
                Cause::Syntax { text: text.into(), expected: "a mesh of at most 1,048,576 devices".into() }.into()
            );
        }
        Ok(Mesh { axes })
    }
}

/// What a rule has in place of an axis where a dimension is not split.
const NONE: &str = "none";
/// What a rule has in place of a dimension that each tensor chooses.
pub const ANY: &str = "*";
/// What the axes of a rule stand in where blocks go round.
const RING: &str = "ring";
/// What an axis has in front of it where a rule says at which place along it tensors lie.
pub const AT: char = '@';

/// A rule: a dimension is split over axes; or tensors lie at one place along an axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The dimension, or [`ANY`]: the largest that can be split and is not split otherwise; or [`AT`] and an axis.
    pub dim: Name,
    /// The axes, the outermost first; none: it is not split, or tensors lie everywhere along the axis.
    pub axes: Vec<Name>,
    /// Whether a tensor that cannot be split so stays whole there, in place of an error.
    pub optional: bool,
    /// Whether blocks of what is split so go round where all of it would be gathered.
    pub ring: bool,
    /// The place along the axis, if the rule is about that.
    pub at: Option<usize>,
}

impl Rule {
    /// Whether it is about tensors whatever dimensions they have.
    pub(crate) fn is_for_all(&self) -> bool {
        *self.dim == *ANY || self.dim.starts_with(AT)
    }

    /// `data+x?`, as behind the colon.
    fn over(&self) -> String {
        if let Some(at) = self.at {
            return at.to_string();
        }
        let axes = self.axes.iter().map(|a| &**a).collect::<Vec<_>>().join("+");
        match (axes.as_str(), self.optional) {
            ("", _) => NONE.into(),
            (axes, _) if self.ring => format!("{RING}({axes})"),
            (axes, true) => format!("{axes}?"),
            (axes, false) => axes.into(),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.dim, self.over())
    }
}

impl FromStr for Rule {
    type Err = Error;
    fn from_str(text: &str) -> Result<Rule, Error> {
        let syntax = |expected: &str| Cause::Syntax { text: text.trim().into(), expected: expected.into() };
        let (dim, over) = text.split_once(':').map(|(d, a)| (d.trim(), a.trim())).unwrap_or_default();
        let round = over.strip_prefix(RING).and_then(|rest| rest.trim_start().strip_prefix('(')?.strip_suffix(')'));
        let ring = round.is_some();
        let (over, optional) = match over.strip_suffix('?') {
            _ if ring => (round.unwrap_or_default().trim(), true),
            Some(over) => (over.trim_end(), true),
            None => (over, false),
        };
        if let Some(axis) = dim.strip_prefix(AT) {
            let at = if over == NONE { Some(None) } else { over.parse().ok().map(Some) };
            let (true, false, Some(at)) = (is_name(axis), optional, at) else {
                return Err(syntax("a stage @axis:number, such as `@pipe:0`").into());
            };
            let axes = at.map(|_| axis.into()).into_iter().collect();
            return Ok(Rule { dim: dim.into(), axes, optional, ring, at });
        }
        let axes: Vec<&str> = if over == NONE { vec![] } else { over.split('+').map(str::trim).collect() };
        if !(is_name(dim) || dim == ANY)
            || axes.iter().any(|a| !is_name(a) || *a == NONE)
            || axes.is_empty() && optional
            || ring && dim == ANY
        {
            return Err(syntax("a rule dimension:axis, such as `x:x` in `batch:data, x:x`").into());
        }
        if axes.iter().enumerate().any(|(i, a)| axes[..i].contains(a)) {
            return Err(syntax("a rule that names each axis once, such as `batch:data+x`").into());
        }
        Ok(Rule { dim: dim.into(), axes: axes.into_iter().map(Name::from).collect(), optional, ring, at: None })
    }
}

/// The kinds of tensors that may have rules of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Section {
    /// Variables, where they live between steps.
    Variables,
    /// The gradients of variables, and where they are added up.
    Gradients,
    /// Optimizer slots and the update.
    Slots,
    /// Everything else.
    Activations,
}

impl Section {
    /// All of them.
    pub const ALL: [Section; 4] = [Section::Variables, Section::Gradients, Section::Slots, Section::Activations];
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Section::Variables => "variables",
            Section::Gradients => "gradients",
            Section::Slots => "slots",
            Section::Activations => "activations",
        })
    }
}

/// A pattern of paths in a program: `decoder/**`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Name);

impl Pattern {
    /// Whether it matches a path. `*` in a part stands for any text, the part `**` for any number of parts.
    pub fn matches(&self, path: &str) -> bool {
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        let text = |p: &str, part: &str| {
            wild(&p.chars().collect::<Vec<_>>(), &part.chars().collect::<Vec<_>>(), &|c| *c == '*', &|c, d| c == d)
        };
        let one = |p: &&str, part: &&str| if p.contains('*') { text(p, part) } else { p == part };
        wild(&self.0.split('/').collect::<Vec<_>>(), &parts, &|p| *p == "**", &one)
    }
    /// Its text without the wild cards at its ends, to look for what was meant.
    pub(crate) fn core(&self) -> &str {
        self.0.trim_matches(|c| c == '*' || c == '/')
    }
}

/// Whether a list matches a pattern in which `any` stands for any number of elements.
fn wild<P, T>(pattern: &[P], list: &[T], any: &dyn Fn(&P) -> bool, one: &dyn Fn(&P, &T) -> bool) -> bool {
    // By length of the list's part: whether the pattern so far matches it.
    let mut reached: Vec<bool> = (0..=list.len()).map(|n| n == 0).collect();
    for p in pattern {
        if any(p) {
            (1..reached.len()).for_each(|n| reached[n] |= reached[n - 1]);
        } else {
            (1..reached.len()).rev().for_each(|n| reached[n] = reached[n - 1] && one(p, &list[n - 1]));
            reached[0] = false;
        }
    }
    reached[list.len()]
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A single part would look like a section, or in a table like a dimension.
        let alone = is_name(&self.0) || *self.0 == *ANY;
        write!(f, "{}{}", if alone { "/" } else { "" }, self.0)
    }
}

impl FromStr for Pattern {
    type Err = Error;
    fn from_str(text: &str) -> Result<Pattern, Error> {
        let text = text.trim();
        let path = text.strip_prefix('/').unwrap_or(text);
        let part = |p: &str| !p.is_empty() && !p.contains(|c: char| c.is_whitespace() || "{},;:".contains(c));
        if text.len() > 256 || !path.split('/').all(part) {
            let expected = "a pattern of paths, such as `decoder/**` in `decoder/**{ x:none }`".into();
            return Err(Cause::Syntax { text: text.into(), expected }.into());
        }
        Ok(Pattern(path.into()))
    }
}

/// Which tensors the rules of a block are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// A kind of tensors.
    Section(Section),
    /// What is in some modules.
    Scope(Pattern),
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Head::Section(s) => fmt::Display::fmt(s, f),
            Head::Scope(p) => fmt::Display::fmt(p, f),
        }
    }
}

impl FromStr for Head {
    type Err = Error;
    fn from_str(text: &str) -> Result<Head, Error> {
        match Section::ALL.into_iter().find(|s| s.to_string() == text.trim()) {
            Some(section) => Ok(Head::Section(section)),
            None => text.parse().map(Head::Scope),
        }
    }
}

/// What stands in front of the order of a pipeline.
const SCHEDULE: &str = "schedule";
/// What stands in front of whether tensors may be gathered whole.
const GATHERS: &str = "gathers";

/// What a part of a layout says behind a word that is no dimension, if that is what it begins with.
fn behind<'a>(word: &str, part: &'a str) -> Option<&'a str> {
    part.split_once(':').filter(|(key, _)| key.trim() == word).map(|(_, value)| value)
}

/// Takes what a layout says once.
fn once<T>(said: &mut Option<T>, word: &str, value: T) -> Result<(), Error> {
    match said.replace(value) {
        None => Ok(()),
        Some(_) => Err(Cause::TwoRules { dim: word.into() }.into()),
    }
}

/// Layout rules: which dimension is split over which mesh axes, `batch:data, x:x, slots{ *:data }`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout {
    /// Rules for every tensor.
    pub(crate) rules: Vec<Rule>,
    /// Rules for some.
    pub(crate) blocks: Vec<(Head, Layout)>,
    /// The order of a pipeline, if it is said.
    schedule: Option<Schedule>,
    /// Whether tensors may be gathered whole, if it is said.
    gathers: Option<Gathers>,
}

/// A rule with the blocks around it.
#[derive(Clone, Copy, Debug)]
pub struct Scoped<'a> {
    /// The section it stands in.
    pub section: Option<Section>,
    /// The scope it stands in.
    pub scope: Option<&'a Pattern>,
    /// The rule.
    pub rule: &'a Rule,
}

impl fmt::Display for Scoped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.section, self.scope) {
            (None, None) => write!(f, "{}", self.rule),
            (Some(s), None) => write!(f, "{s}{{{}}}", self.rule),
            (None, Some(p)) => write!(f, "{p}{{{}}}", self.rule),
            (Some(s), Some(p)) => write!(f, "{s}{{{p}{{{}}}}}", self.rule),
        }
    }
}

impl Layout {
    /// A layout of rules and blocks.
    pub(crate) fn made(rules: Vec<Rule>, blocks: Vec<(Head, Layout)>) -> Layout {
        Layout { rules, blocks, schedule: None, gathers: None }
    }

    /// This layout with more rules for every tensor, or blocks.
    ///
    /// # Errors
    /// A text that is no layout; a second rule for a dimension, or a second block for the same tensors.
    pub fn with(mut self, text: &str) -> Result<Layout, Error> {
        let more: Layout = text.parse()?;
        self.schedule = more.schedule.or(self.schedule);
        more.rules.into_iter().try_for_each(|rule| self.add_rule(rule))?;
        more.blocks.into_iter().try_for_each(|(head, block)| self.add_block(head, block))?;
        Ok(self)
    }

    /// This layout with rules for what is in the modules of a pattern: `layout.scope("decoder/**", "x:none")`.
    ///
    /// # Errors
    /// As [`Layout::with`]; blocks among the rules.
    pub fn scope(self, pattern: &str, rules: &str) -> Result<Layout, Error> {
        self.block(Head::Scope(pattern.parse()?), rules)
    }

    /// This layout with rules (and scopes) for a kind of tensors: `layout.section(Section::Slots, "*:data")`.
    ///
    /// # Errors
    /// As [`Layout::with`]; sections among the rules.
    pub fn section(self, section: Section, rules: &str) -> Result<Layout, Error> {
        self.block(Head::Section(section), rules)
    }

    fn block(self, head: Head, rules: &str) -> Result<Layout, Error> {
        self.with(&format!("{head}{{{}}}", rules.parse::<Layout>()?))
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.scoped().next().is_none() && self.schedule.is_none() && self.gathers.is_none()
    }

    /// The layout, by which tensors may be gathered whole although no rule asks for it.
    pub(crate) fn allowing_gathers(self) -> Layout {
        Layout { gathers: Some(Gathers::Allow), ..self }
    }

    /// Whether tensors may be gathered whole although no rule asks for it.
    pub fn gathers(&self) -> Gathers {
        self.gathers.unwrap_or_default()
    }

    /// In which order the stages of a pipeline work.
    pub fn schedule(&self) -> Schedule {
        self.schedule.unwrap_or_default()
    }

    /// Whether some rule names the axis.
    pub fn uses(&self, axis: &str) -> bool {
        self.scoped().any(|s| s.rule.axes.iter().any(|a| *a == axis))
    }

    /// All rules in order, with the blocks around them.
    pub fn scoped(&self) -> impl Iterator<Item = Scoped<'_>> {
        let mut all = vec![];
        self.collect(None, None, &mut all);
        all.into_iter()
    }

    fn collect<'a>(&'a self, section: Option<Section>, scope: Option<&'a Pattern>, all: &mut Vec<Scoped<'a>>) {
        all.extend(self.rules.iter().map(|rule| Scoped { section, scope, rule }));
        for (head, block) in &self.blocks {
            match head {
                Head::Section(s) => block.collect(Some(*s), scope, all),
                Head::Scope(p) => block.collect(section, Some(p), all),
            }
        }
    }

    /// This layout with another rule in place of each, or none.
    pub(crate) fn mapped(&self, to: &dyn Fn(Scoped) -> Option<Rule>) -> Layout {
        self.mapped_in(None, None, to)
    }

    fn mapped_in(
        &self,
        section: Option<Section>,
        scope: Option<&Pattern>,
        to: &dyn Fn(Scoped) -> Option<Rule>,
    ) -> Layout {
        let rules = self.rules.iter().filter_map(|rule| to(Scoped { section, scope, rule })).collect();
        let inner = |(head, block): &(Head, Layout)| {
            let block = match head {
                Head::Section(s) => block.mapped_in(Some(*s), scope, to),
                Head::Scope(p) => block.mapped_in(section, Some(p), to),
            };
            (!block.is_empty()).then(|| (head.clone(), block))
        };
        let blocks = self.blocks.iter().filter_map(inner).collect();
        Layout { rules, blocks, schedule: self.schedule, gathers: self.gathers }
    }

    /// This layout with a rule for the tensors of a section and a scope, in place of the one that they have there for its
    /// dimension, if they have one.
    pub(crate) fn replacing(mut self, section: Option<Section>, scope: Option<&Pattern>, rule: Rule) -> Layout {
        let heads = section.map(Head::Section).into_iter().chain(scope.cloned().map(Head::Scope));
        let mut block = &mut self;
        for head in heads {
            let at = block.blocks.iter().position(|(h, _)| *h == head).unwrap_or_else(|| {
                block.blocks.push((head, Layout::default()));
                block.blocks.len() - 1
            });
            block = &mut block.blocks[at].1;
        }
        match block.rules.iter_mut().find(|r| r.dim == rule.dim) {
            Some(old) => *old = rule,
            None => block.rules.push(rule),
        }
        self
    }

    fn add_rule(&mut self, rule: Rule) -> Result<(), Error> {
        if self.rules.iter().any(|r| r.dim == rule.dim) {
            return Err(Cause::TwoRules { dim: rule.dim }.into());
        }
        self.rules.push(rule);
        Ok(())
    }

    fn add_block(&mut self, head: Head, block: Layout) -> Result<(), Error> {
        if self.blocks.iter().any(|(h, _)| *h == head) {
            return Err(Cause::TwiceNamed { what: "blocks of the layout", name: head.to_string().into() }.into());
        }
        // What is empty says nothing, and is not written.
        if !block.is_empty() {
            self.blocks.push((head, block));
        }
        Ok(())
    }

    /// Reads rules and blocks up to the end of the block inside `within`; returns the rest of the text.
    fn read<'a>(&mut self, mut text: &'a str, within: &[Head], whole: &str) -> Result<&'a str, Error> {
        let unbalanced = || -> Error {
            let expected = "a layout whose blocks are closed, such as `slots{ *:data }`".into();
            Cause::Syntax { text: whole.trim().into(), expected }.into()
        };
        loop {
            let end = text.find([',', ';', '\n', '{', '}']).unwrap_or(text.len());
            let (part, stop) = (&text[..end], text[end..].chars().next());
            text = text.get(end + 1..).unwrap_or_default();
            let here = |e| inside(e, "layout", whole, part);
            if stop == Some('{') {
                let head: Head = part.parse().map_err(here)?;
                let fits = match within {
                    [] => true,
                    [Head::Section(_)] => matches!(head, Head::Scope(_)),
                    _ => false,
                };
                if !fits {
                    let expected = "a scope in a section, and no other block in a block".into();
                    return Err(here(Cause::Syntax { text: part.trim().into(), expected }.into()));
                }
                let mut block = Layout::default();
                text = block.read(text, &[within, std::slice::from_ref(&head)].concat(), whole)?;
                self.add_block(head, block).map_err(here)?;
                continue;
            }
            if let (Some(schedule), []) = (behind(SCHEDULE, part), within) {
                schedule.parse().and_then(|s| once(&mut self.schedule, SCHEDULE, s)).map_err(here)?;
            } else if let (Some(gathers), []) = (behind(GATHERS, part), within) {
                gathers.parse().and_then(|g| once(&mut self.gathers, GATHERS, g)).map_err(here)?;
            } else if !part.trim().is_empty() {
                part.parse().and_then(|rule| self.add_rule(rule)).map_err(here)?;
            }
            match (stop, within) {
                (None, []) => return Ok(""),
                (Some('}'), [_, ..]) => return Ok(text),
                (None, _) | (Some('}'), []) => return Err(unbalanced()),
                _ => {}
            }
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.rules.iter().map(Rule::to_string);
        let blocks = self.blocks.iter().map(|(head, block)| format!("{head}{{{block}}}"));
        let schedule = self.schedule.map(|s| format!("{SCHEDULE}:{s}"));
        let gathers = self.gathers.map(|g| format!("{GATHERS}:{g}"));
        f.write_str(&rules.chain(blocks).chain(schedule).chain(gathers).collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Layout {
    type Err = Error;
    fn from_str(text: &str) -> Result<Layout, Error> {
        let mut layout = Layout::default();
        layout.read(text, &[], text)?;
        Ok(layout)
    }
}

impl Serialize for Layout {
    /// A table: `batch = "data"`, and a table for each block.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = to.serialize_map(None)?;
        self.schedule.iter().try_for_each(|s| map.serialize_entry(SCHEDULE, &s.to_string()))?;
        self.gathers.iter().try_for_each(|g| map.serialize_entry(GATHERS, &g.to_string()))?;
        self.rules.iter().try_for_each(|r| map.serialize_entry(&r.dim, &r.over()))?;
        self.blocks.iter().try_for_each(|(head, block)| map.serialize_entry(&head.to_string(), block))?;
        map.end()
    }
}

impl<'a> Deserialize<'a> for Layout {
    /// A table, or a layout's text.
    fn deserialize<D: Deserializer<'a>>(from: D) -> Result<Layout, D::Error> {
        let (Written::Text(text) | Written::Table(text)) = Written::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A layout of some format, as text.
enum Written {
    Text(String),
    Table(String),
}

impl<'a> Deserialize<'a> for Written {
    fn deserialize<D: Deserializer<'a>>(from: D) -> Result<Written, D::Error> {
        struct Visitor;
        impl<'a> serde::de::Visitor<'a> for Visitor {
            type Value = Written;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("layout rules: a text, or a table of axes by dimension, with a table for each block")
            }
            fn visit_str<E>(self, text: &str) -> Result<Written, E> {
                Ok(Written::Text(text.into()))
            }
            fn visit_map<A: serde::de::MapAccess<'a>>(self, mut map: A) -> Result<Written, A::Error> {
                let mut parts = vec![];
                while let Some(key) = map.next_key::<String>()? {
                    parts.push(map.next_value_seed(Entry(&key))?);
                }
                Ok(Written::Table(parts.join(",")))
            }
        }
        from.deserialize_any(Visitor)
    }
}

/// What stands behind a key of a table: as text, and a layout by itself, so that a mistake is told at its line.
struct Entry<'k>(&'k str);

impl<'a> serde::de::DeserializeSeed<'a> for Entry<'_> {
    type Value = String;
    fn deserialize<D: Deserializer<'a>>(self, from: D) -> Result<String, D::Error> {
        let text = match Written::deserialize(from)? {
            Written::Text(axes) => format!("{}:{axes}", self.0),
            Written::Table(rules) => format!("{}{{{rules}}}", self.0),
        };
        text.parse::<Layout>().map_err(serde::de::Error::custom)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rules for some of the dimensions.
    fn rules() -> impl Strategy<Value = String> {
        let axes = prop_oneof![
            Just("none".to_string()),
            ("[a-d]{1,2}", any::<bool>()).prop_map(|(a, o)| format!("{a}{}", if o { "?" } else { "" })),
            Just("a+ b".to_string()),
            Just("c+a+b?".to_string()),
            Just("ring ( a +b)".to_string()),
        ];
        let dim = prop_oneof![Just("x".to_string()), "[a-z]{1,4}", Just("k.x".to_string())];
        let stage = prop::option::of(prop_oneof![Just("@a: none"), Just("@a:2"), Just(" @ab : 11 ")]);
        (prop::collection::btree_map(dim, axes, 0..4), stage).prop_map(|(m, stage)| {
            // What each tensor chooses does not go round.
            let any = m.values().next().filter(|a| !a.starts_with(RING)).map(|a| format!("*: {a}"));
            let rules = m.iter().map(|(d, a)| format!(" {d} : {a}")).chain(any);
            rules.chain(stage.map(String::from)).collect::<Vec<_>>().join(" ;")
        })
    }

    /// Scopes, each with rules.
    fn scopes() -> impl Strategy<Value = String> {
        let pattern = prop_oneof![
            Just("**"),
            Just("decoder/**"),
            Just("a.*/b"),
            Just("*/*"),
            Just("x"),
            Just("*"),
            Just("/slots")
        ];
        prop::collection::btree_map(pattern, rules(), 0..3)
            .prop_map(|m| m.iter().map(|(p, r)| format!("{p} {{{r}}}")).collect::<Vec<_>>().join("\n"))
    }

    /// A layout's text.
    fn layouts() -> impl Strategy<Value = String> {
        let section = (0usize..4, rules(), scopes()).prop_map(|(s, r, p)| (Section::ALL[s], format!("{r},{p}")));
        let schedule = prop::option::of(prop_oneof![
            Just("schedule : gpipe"),
            Just("schedule:1f1b"),
            Just("schedule:zero-bubble"),
            Just("gathers: allow"),
            Just("gathers:refuse;schedule:1f1b")
        ]);
        let sections = prop::collection::vec(section, 0..3);
        (rules(), scopes(), sections, schedule).prop_map(|(rules, scopes, mut sections, schedule)| {
            sections.sort();
            sections.dedup_by_key(|(s, _)| *s);
            let sections = sections.iter().map(|(s, r)| format!("{s}{{{r}}}")).collect::<Vec<_>>().join(", ");
            format!("{rules};{scopes},{sections};{}", schedule.unwrap_or_default())
        })
    }

    #[test]
    fn a_mistake_in_a_table_is_told_at_its_line() {
        let line = |text: &str| {
            let span = toml::from_str::<Layout>(text).unwrap_err().span().unwrap();
            text[..span.start].matches('\n').count() + 1
        };
        assert_eq!(line("x = \"a\"\ny = \"a+\""), 2);
        assert_eq!(line("x = \"a\"\n\n[slots]\n\"*\" = \"a\"\nz = \"\""), 5);
        assert_eq!(line("[\"b/**\"]\nx = \"a\"\n[\"b c\"]\nx = \"a\""), 3);
        assert_eq!(line("x = \"a\"\nx = \"b\""), 2);
        assert_eq!(line("x = \"a\"\ny = 3"), 2);
    }

    proptest! {
        #[test]
        fn meshes_read_back_as_they_are_written(axes in prop::collection::btree_map("[a-z]{1,3}", 1usize..9, 0..4)) {
            let text = axes.iter().map(|(n, s)| format!("{n}={s}")).collect::<Vec<_>>().join(", ");
            let mesh: Mesh = text.parse().unwrap();
            prop_assert_eq!(mesh.to_string().parse::<Mesh>().unwrap(), mesh.clone());
            prop_assert_eq!(mesh.size(), axes.values().product::<usize>());
        }

        #[test]
        fn layouts_read_back_as_they_are_written(text in layouts()) {
            let layout: Layout = text.parse().unwrap();
            prop_assert_eq!(layout.to_string().parse::<Layout>().unwrap(), layout.clone());
            let table = toml::to_string(&layout).unwrap();
            prop_assert_eq!(toml::from_str::<Layout>(&table).unwrap(), layout.clone(), "{}", table);
            // Built part by part it is the same.
            let mut built = Layout { schedule: layout.schedule, gathers: layout.gathers, ..Layout::default() };
            for rule in &layout.rules {
                built = built.with(&rule.to_string()).unwrap();
            }
            for (head, block) in &layout.blocks {
                built = match head {
                    Head::Section(s) => built.section(*s, &block.to_string()),
                    Head::Scope(p) => built.scope(&p.to_string(), &block.to_string()),
                }.unwrap();
            }
            prop_assert_eq!(&built, &layout);
            prop_assert_eq!(&layout.mapped(&|s| Some(s.rule.clone())), &layout);
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,40}", marks in "[a1@*:/+?{}(),; \n-]{0,40}") {
            for text in [text, marks] {
                let _ = text.parse::<Mesh>();
                let read = text.parse::<Layout>();
                prop_assert!(read.is_ok_and(|l| l.to_string().parse::<Layout>() == Ok(l)) || text.parse::<Layout>().is_err());
                let _ = toml::from_str::<Layout>(&text);
            }
        }

        #[test]
        fn a_star_is_any_text_and_two_are_any_parts(parts in prop::collection::vec("[ab]{1,3}", 0..4), at in 0usize..4) {
            let path = parts.join("/");
            let matches = |p: &str| p.parse::<Pattern>().unwrap().matches(&path);
            prop_assert!(matches("**"));
            prop_assert_eq!(matches("*"), parts.len() == 1);
            prop_assert_eq!(matches("*/**"), !parts.is_empty());
            prop_assert_eq!(matches("**/*b"), parts.last().is_some_and(|p| p.ends_with('b')));
            prop_assert_eq!(matches("a*/**/b"), parts.len() > 1 && parts[0].starts_with('a') && parts[parts.len() - 1] == "b");
            if at < parts.len() {
                let mut pattern = parts.clone();
                pattern[at] = "*".into();
                prop_assert!(matches(&pattern.join("/")));
                pattern[at] = "c".into();
                prop_assert!(!matches(&pattern.join("/")));
            }
        }
    }
}
