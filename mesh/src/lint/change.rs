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
    let none = Rule { dim: dim.clone(), axes: vec![], optional: false, ring: false, at: None };
    let mut rule = old.map_or(none, |s| s.rule.clone());
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
            let optional = s.rule.optional;
            let rule = Rule { dim: other.clone(), axes: vec![axis.clone()], optional, ring: false, at: None };
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A layout with a change, as text.
    fn changed(change: Change) -> String {
        let text = change.layout.map(|l| l.to_string()).unwrap_or_default();
        assert_eq!(text.parse::<Layout>().map(|l| l.to_string()), Ok(text.clone()));
        text
    }

    #[test]
    fn changes_edit_rules_where_they_stand() {
        let layout: Layout = "batch:data,x:x?,bottom/**{x:none,channel:x},slots{*:data}".parse().unwrap();
        let [batch, x, y, channel, data] = ["batch", "x", "y", "channel", "data"].map(Name::from);
        for (change, says) in [
            // An axis more, for a dimension that is split already.
            (Change::split(&layout, &batch, &x), "batch:data+x,x:x?,bottom/**{x:none,channel:x},slots{*:data}"),
            (Change::split(&layout, &y, &x), "batch:data,x:x?,y:x,bottom/**{x:none,channel:x},slots{*:data}"),
            (Change::only(&layout, &y, &x), "batch:data,y:x,bottom/**{x:none},slots{*:data}"),
            (Change::instead(&layout, &x, &x, &y), "batch:data,y:x,bottom/**{x:none,channel:x},slots{*:data}"),
            // In the scope where the rule stands.
            (Change::instead(&layout, &channel, &x, &y), "batch:data,x:x?,bottom/**{x:none,y:x},slots{*:data}"),
            // What is about memory stays.
            (Change::without(&layout, &batch, &data), "x:x?,bottom/**{x:none,channel:x},slots{*:data}"),
            (
                Change::sections(&layout, &[Section::Slots, Section::Variables], &[&data, &x]),
                "batch:data,x:x?,bottom/**{x:none,channel:x},slots{*:data+x},variables{*:data+x}",
            ),
        ] {
            assert_eq!(changed(change), says);
        }
    }

    #[test]
    fn an_axis_of_one_device_goes_unless_a_rule_names_it() {
        let (mesh, layout): (Mesh, Layout) = ("data=4,x=2".parse().unwrap(), "batch:data".parse().unwrap());
        let resized = |axis: &str, size| Change::resized(&mesh, &layout, &axis.into(), size).to_string();
        assert_eq!(resized("x", 1), "--mesh data=4");
        assert_eq!(resized("data", 1), "--mesh data=1,x=2");
        assert_eq!(resized("data", 2), "--mesh data=2,x=2");
    }

    #[test]
    fn a_change_is_text_that_a_shell_takes() {
        let of = |text: &str| Change::layout(text.parse().unwrap()).to_string();
        assert_eq!(of("batch:data+x"), "--layout batch:data+x");
        assert_eq!(of("slots{*:data}"), "--layout 'slots{*:data}'");
        assert_eq!(of("x':x"), "--layout 'x'\\'':x'");
        assert_eq!(of(""), "--layout ''");
    }
}
