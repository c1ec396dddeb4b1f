//! Why a tensor lies as it does: of each of its dimensions, the rule that decided, in words.

use super::{Placement, Subject};
use crate::dim::Name;
use crate::error::{Cause, Error};
use crate::layout::{ANY, AT, Layout, Rule, Scoped};

/// Words for why a rule that may give way did.
fn obstacle(e: &Error, dim: &str) -> String {
    match &e.cause {
        Cause::AxisTwice { axis, first, second, .. } => {
            format!("`{}` has the axis `{axis}`", if **first == *dim { second } else { first })
        }
        Cause::MoreShardsThanChunks { chunks, shards, .. } => {
            format!("{chunks} chunks are too few for {shards} devices")
        }
        other => other.to_string(),
    }
}

impl Placement<'_> {
    /// Why a tensor lies as it does: a line for each stage and dimension that a rule says something of, or one that none
    /// does. Empty for a tensor that [`Placement::spec`] refuses.
    pub fn why(&self, t: &Subject) -> Vec<String> {
        let own: Option<Layout> = t.own.and_then(|own| own.parse().ok());
        let Ok(spec) = self.spec(t) else { return vec![] };
        let named = |s: &Scoped| match own {
            Some(_) => format!("its own rule `{}`", s.rule),
            None => format!("the rule `{s}`"),
        };
        let over = |axes: &[usize]| axes.iter().map(|a| &*self.mesh.axes()[*a].0).collect::<Vec<_>>().join("+");
        let mut lines = vec![];
        for (axis, at) in &spec.stage {
            let axis = &self.mesh.axes()[*axis].0;
            if let Some(s) = self.deciding(own.as_ref(), t, &format!("{AT}{axis}")) {
                lines.push(format!("it lies at place {at} along {axis} by {}", named(&s)));
            }
        }
        let any = self.deciding(own.as_ref(), t, ANY);
        let needed = |dim: &Name| t.whole.iter().find(|(d, _)| d == dim).map(|(_, why)| *why);
        for (i, d) in t.ty.dims.iter().enumerate() {
            let axes = &spec.dims[i];
            let rule = self.deciding(own.as_ref(), t, &d.name);
            let of = |rule: &Rule| self.axes(rule);
            let line = match (&rule, &any) {
                (Some(s), _) if !axes.is_empty() && of(s.rule) == *axes => {
                    format!("split over {} by {}", over(axes), named(s))
                }
                (_, Some(s)) if !axes.is_empty() => {
                    format!("split over {} by {}, as the largest that can be", over(axes), named(s))
                }
                (Some(s), _) if s.rule.axes.is_empty() => format!("whole by {}", named(s)),
                (Some(s), _) => match (needed(&d.name), self.fits(t, &spec, i, &of(s.rule))) {
                    (Some(why), _) => format!("whole in spite of {}: {why}", named(s)),
                    (None, Err(e)) => format!("whole: {} gives way, since {}", named(s), obstacle(&e, &d.name)),
                    (None, Ok(())) => format!("whole: the axes of {} have a size of 1", named(s)),
                },
                (None, _) => continue,
            };
            lines.push(format!("`{}` is {line}", d.name));
        }
        if lines.is_empty() {
            lines.push("it is whole: no rule is about its dimensions".into());
        }
        lines
    }
}
