//! What a finding suggests: another mesh, or the layout with some of its rules edited.

use crate::dim::Name;
use crate::layout::{ANY, Layout, Mesh, Rule, Scoped, Section};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Another mesh, another layout, or both: what can be applied as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// The whole mesh in place of the one there is.
    #[serde(with = "text")]
    pub mesh: Option<Mesh>,
    /// The whole layout in place of the one there is.
    #[serde(with = "text")]
    pub layout: Option<Layout>,
}

/// As options take them.
mod text {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
    use std::fmt::Display;
    use std::str::FromStr;

    pub fn serialize<T: Display, S: Serializer>(value: &Option<T>, to: S) -> Result<S::Ok, S::Error> {
        value.as_ref().map(T::to_string).serialize(to)
    }
    pub fn deserialize<'a, T: FromStr<Err: Display>, D: Deserializer<'a>>(from: D) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|t| t.parse()).transpose().map_err(D::Error::custom)
    }
}

/// Whether a rule is about time. Those of variables, gradients and slots are about memory: they cost time, and are meant to.
pub(super) fn about_time(s: &Scoped) -> bool {
    matches!(s.section, None | Some(Section::Activations))
}

/// A rule without an axis; none, if it is the only one.
fn without(rule: &Rule, axis: &Name) -> Option<Rule> {
    let axes: Vec<Name> = rule.axes.iter().filter(|a| *a != axis).cloned().collect();
    let left = axes.len() == rule.axes.len() || !axes.is_empty();
    left.then(|| Rule { axes, ..rule.clone() })
}

/// A rule for a dimension in a section, with one axis more than it has there.
fn adding(layout: Layout, section: Option<Section>, dim: &Name, axis: &Name) -> Layout {
    let old = layout.scoped().find(|s| s.section == section && s.scope.is_none() && s.rule.dim == *dim);
    let mut rule = old.map_or(Rule { dim: dim.clone(), axes: vec![], optional: false }, |s| s.rule.clone());
    if !rule.axes.contains(axis) {
        rule.axes.push(axis.clone());
    }
    layout.replacing(section, None, rule)
}

impl Change {
    pub(super) fn layout(layout: Layout) -> Change {
        Change { mesh: None, layout: Some(layout) }
    }
    /// A dimension split over an axis, beside those that it is split over already.
    pub(super) fn split(layout: &Layout, dim: &Name, axis: &Name) -> Change {
        Change::layout(adding(layout.clone(), None, dim, axis))
    }
    /// A dimension split over an axis, and no other one.
    pub(super) fn only(layout: &Layout, dim: &Name, axis: &Name) -> Change {
        let others = |s: Scoped| if about_time(&s) { without(s.rule, axis) } else { Some(s.rule.clone()) };
        Change::split(&layout.mapped(&others), dim, axis)
    }
    /// Wherever rules split `dim` over an axis, `other` in place of it.
    pub(super) fn instead(layout: &Layout, dim: &Name, axis: &Name, other: &Name) -> Change {
        let concerned = |s: &Scoped| about_time(s) && s.rule.dim == *dim && s.rule.axes.contains(axis);
        let mut to = Change::taking_out(layout, dim, axis);
        for s in layout.scoped().filter(concerned) {
            let rule = Rule { dim: other.clone(), axes: vec![axis.clone()], optional: s.rule.optional };
            to = match s.scope {
                None => adding(to, s.section, other, axis),
                Some(_) => to.replacing(s.section, s.scope, rule),
            };
        }
        Change::layout(to)
    }
    /// A dimension not split over an axis.
    pub(super) fn without(layout: &Layout, dim: &Name, axis: &Name) -> Change {
        Change::layout(Change::taking_out(layout, dim, axis))
    }
    fn taking_out(layout: &Layout, dim: &Name, axis: &Name) -> Layout {
        let rule =
            |s: Scoped| if about_time(&s) && s.rule.dim == *dim { without(s.rule, axis) } else { Some(s.rule.clone()) };
        layout.mapped(&rule)
    }
    /// The largest dimension of each tensor of some sections split over axes.
    pub(super) fn sections(layout: &Layout, sections: &[Section], axes: &[&Name]) -> Change {
        let any = Name::from(ANY);
        let pairs = sections.iter().flat_map(|s| axes.iter().map(move |a| (*s, *a)));
        Change::layout(pairs.fold(layout.clone(), |l, (section, axis)| adding(l, Some(section), &any, axis)))
    }
    /// An axis of `size` devices; of one: none, if no rule names it.
    pub(super) fn resized(mesh: &Mesh, layout: &Layout, axis: &Name, size: usize) -> Change {
        let needed = size > 1 || layout.uses(axis);
        Change { mesh: Some(mesh.resized(axis, needed.then_some(size))), layout: None }
    }
}

impl fmt::Display for Change {
    /// As options of a command.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.,:=+".contains(c);
        let quoted = |text: String| match !text.is_empty() && text.chars().all(plain) {
            true => text,
            false => format!("'{}'", text.replace('\'', "'\\''")),
        };
        let mesh = self.mesh.iter().map(|m| format!("--mesh {}", quoted(m.to_string())));
        let layout = self.layout.iter().map(|l| format!("--layout {}", quoted(l.to_string())));
        f.write_str(&mesh.chain(layout).collect::<Vec<_>>().join(" "))
    }
}
