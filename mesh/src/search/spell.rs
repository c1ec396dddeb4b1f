//! What was found in the language of layouts: rules for every tensor, blocks for segments that are split otherwise, and
//! sections for ZeRO.

use super::outline::Outline;
use super::segments::{Segment, Segments};
use super::split::{Axes, Way};
use crate::error::Error;
use crate::layout::{ANY, AT, Head, Layout, Mesh, Pattern, Rule, Section};
use crate::placement::{Placement, subjects};
use crate::program::Program;
use std::collections::BTreeMap;

/// A mesh whose axes are called like what they split: the dimension, or `model` where that is several ones.
pub fn named(mesh: &Mesh, outline: &Outline, ways: &[Way]) -> Result<Mesh, Error> {
    let mut taken: Vec<String> = vec![];
    for axis in 0..mesh.axes().len() {
        let mut votes: BTreeMap<String, usize> = BTreeMap::new();
        for way in ways {
            let split = (0..outline.dims.names.len()).filter(|d| way.splits.of(*d) >> axis & 1 == 1);
            let name = match split.collect::<Vec<_>>()[..] {
                [] => continue,
                [d] => outline.dims.names[d].to_string(),
                _ => "model".into(),
            };
            *votes.entry(name).or_default() += 1;
        }
        let name = votes.into_iter().rev().max_by_key(|(_, n)| *n).map_or("spare".into(), |(name, _)| name);
        let again = (2..).map(|i| format!("{name}{i}"));
        let free = std::iter::once(name.clone()).chain(again).find(|n| !taken.contains(n));
        taken.extend(free);
    }
    let sized = taken.iter().zip(mesh.axes()).map(|(name, (_, size))| format!("{name}={size}"));
    sized.collect::<Vec<_>>().join(",").parse()
}

/// The layout by which each segment is split in its way.
///
/// # Errors
/// None, for ways that were found; what a program's names do not let one write.
pub fn layout(mesh: &Mesh, outline: &Outline, segments: &Segments, ways: &[Way]) -> Result<Layout, Error> {
    let axes = |set: Axes| (0..mesh.axes().len()).filter(move |a| set >> a & 1 == 1).map(|a| mesh.axes()[a].0.clone());
    let rule = |dim: &str, set: Axes| Rule {
        dim: dim.into(),
        axes: axes(set).collect(),
        optional: set != 0,
        ring: false,
        at: None,
    };
    let list = || segments.list.iter().zip(ways);
    let mut layout = Layout::default();
    let mut general = vec![0; outline.dims.names.len()];
    for (d, name) in outline.dims.names.iter().enumerate() {
        let by = list().filter(|(s, _)| s.content.chunks.contains_key(&d));
        let rest = by.clone().next().filter(|(s, _)| s.scopes.is_empty()).map(|(_, w)| w.splits.of(d));
        general[d] = rest.unwrap_or_else(|| most(by.map(|(_, w)| w.splits.of(d))));
        if general[d] != 0 {
            layout.rules.push(rule(name, general[d]));
        }
    }
    let own = list().map(|(s, way)| {
        let dims = s.content.chunks.keys().filter(|d| way.splits.of(**d) != general[**d]);
        dims.map(|d| rule(&outline.dims.names[*d], way.splits.of(*d))).collect::<Vec<_>>()
    });
    layout.blocks = blocks(segments, own.collect())?;
    for section in [Section::Slots, Section::Gradients, Section::Variables] {
        let has = |s: &Segment| !s.content.variables.is_empty();
        let usual = most(list().filter(|(s, _)| has(s)).map(|(_, w)| w.zero.of(section)));
        let other = list().map(|(s, w)| match w.zero.of(section) {
            set if has(s) && set != usual => vec![rule(ANY, set)],
            _ => vec![],
        });
        let mut block = Layout::made(vec![], blocks(segments, other.collect())?);
        if usual != 0 {
            block.rules.push(rule(ANY, usual));
        }
        if !block.is_empty() {
            layout.blocks.push((Head::Section(section), block));
        }
    }
    if layout.is_empty() {
        // No text at all would mean the usual layout to a command line.
        layout.rules.push(rule(ANY, 0));
    }
    Ok(layout)
}

/// The value that occurs most; of equals the largest.
fn most(values: impl Iterator<Item = Axes>) -> Axes {
    let mut votes: BTreeMap<Axes, usize> = BTreeMap::new();
    values.for_each(|v| *votes.entry(v).or_default() += 1);
    votes.into_iter().max_by_key(|(_, n)| *n).map_or(0, |(v, _)| v)
}

/// Numbers in a name as `*`.
fn starred(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match c {
            '0'..='9' if out.ends_with('*') => {}
            '0'..='9' => out.push('*'),
            c => out.push(c),
        }
    }
    out
}

/// Blocks with the rules of each segment; those that only differ in numbers are one, where all of that pattern are alike.
fn blocks(segments: &Segments, rules: Vec<Vec<Rule>>) -> Result<Vec<(Head, Layout)>, Error> {
    let mut blocks: Vec<(Head, Layout)> = vec![];
    for (segment, own) in segments.list.iter().zip(&rules).filter(|(_, rules)| !rules.is_empty()) {
        for scope in &segment.scopes {
            let wide = starred(scope);
            let alike =
                segments.list.iter().zip(&rules).all(|(s, r)| r == own || s.scopes.iter().all(|s| starred(s) != wide));
            let pattern: Pattern = format!("{}/**", if alike { &wide } else { &**scope }).parse()?;
            let head = Head::Scope(pattern);
            if blocks.iter().all(|(h, _)| *h != head) {
                blocks.push((head, Layout::made(own.clone(), vec![])));
            }
        }
    }
    Ok(blocks)
}

/// A layout whose segments lie at their stages along an axis; whatever belongs to none lies at the last one.
///
/// # Errors
/// As [`layout`].
pub fn staged(
    mut layout: Layout,
    axis: &str,
    depth: usize,
    segments: &Segments,
    stages: &[usize],
) -> Result<Layout, Error> {
    let at = |stage: usize| Rule {
        dim: format!("{AT}{axis}").into(),
        axes: vec![axis.into()],
        optional: false,
        ring: false,
        at: Some(stage),
    };
    layout.rules.push(at(depth - 1));
    let elsewhere = segments.list.iter().zip(stages).filter(|(_, stage)| **stage + 1 < depth);
    for (segment, stage) in elsewhere {
        for scope in &segment.scopes {
            let head = Head::Scope(format!("{scope}/**").parse()?);
            match layout.blocks.iter_mut().find(|(h, _)| *h == head) {
                Some((_, block)) => block.rules.push(at(*stage)),
                None => layout.blocks.push((head, Layout::made(vec![at(*stage)], vec![]))),
            }
        }
    }
    Ok(layout)
}

/// The layout without `?` where every tensor follows the rule anyway.
pub fn firm(mut layout: Layout, mesh: &Mesh, program: &Program) -> Layout {
    let placement = Placement::new(mesh, &layout, program);
    let all: Vec<&Rule> = layout.scoped().map(|s| s.rule).collect();
    let mut gives_way = vec![false; all.len()];
    for t in subjects(program).iter().filter(|t| t.own.is_none()) {
        let Ok(spec) = placement.spec(t) else { continue };
        for (d, axes) in
            t.ty.dims.iter().zip(&spec.dims).filter(|(d, _)| t.whole.iter().all(|(name, _)| *name != d.name))
        {
            if let Some(deciding) = placement.deciding(None, t, &d.name)
                && placement.axes(deciding.rule) != *axes
                && let Some(at) = all.iter().position(|r| std::ptr::eq(*r, deciding.rule))
            {
                gives_way[at] = true;
            }
        }
    }
    let mut at = gives_way.into_iter();
    set_optional(&mut layout, &mut at);
    layout
}

fn set_optional(layout: &mut Layout, gives_way: &mut impl Iterator<Item = bool>) {
    for rule in &mut layout.rules {
        // Who chooses a dimension gives way by itself.
        rule.optional = gives_way.next() == Some(true) && !rule.is_for_all() && !rule.axes.is_empty();
    }
    layout.blocks.iter_mut().for_each(|(_, block)| set_optional(block, gives_way));
}
