//! Yang et al. 2021, share weights, then unshare: layers share variables for the first part of a run.
//!
//! All that it does is give variables other names: groups of layers use those of `encoder/shared.<groups>.<group>` in
//! place of `encoder/layer.<i>`. The gradient of a shared variable is then the sum over its uses, by itself.

use serde::{Deserialize, Serialize};

/// Which variables of a layer are shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Shared {
    /// All of them.
    #[default]
    Layer,
    /// Those of the attention and its norm.
    Attention,
    /// Those of the feed-forward part and its norm.
    FeedForward,
}

impl Shared {
    /// Whether that variable, or slot, of a layer is shared: `attention/query/kernel`.
    fn has(self, within: &str) -> bool {
        let of_attention = within.starts_with("attention");
        match self {
            Shared::Layer => true,
            Shared::Attention => of_attention,
            Shared::FeedForward => !of_attention,
        }
    }
}

/// Layers in groups that share variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Layers of the encoder.
    pub layers: usize,
    /// Groups; as many as there are layers: nothing is shared.
    pub groups: usize,
    /// What is shared.
    pub shared: Shared,
}

const LAYERS: &str = "encoder/layer.";
const SHARED: &str = "encoder/shared.";

impl Groups {
    /// The path of the variable that a layer uses, or of its slot, from that which the model gives it:
    /// `encoder/layer.3/up/kernel`.
    pub fn path(&self, path: &str) -> String {
        let place = path.strip_prefix(LAYERS).and_then(|p| p.split_once('/'));
        let place = place.and_then(|(i, within)| Some((i.parse::<usize>().ok()?, within)));
        match place {
            Some((layer, within)) if self.groups < self.layers && self.shared.has(within) => {
                format!("{SHARED}{}.{}/{within}", self.groups, layer * self.groups / self.layers)
            }
            _ => path.into(),
        }
    }

    /// For a variable of these groups, or a slot: the path that it has with fewer groups, `before`.
    pub fn origin(&self, path: &str, before: &Groups) -> String {
        // The first layer of the group stands for it.
        let own = path.strip_prefix(&format!("{SHARED}{}.", self.groups)).and_then(|p| p.split_once('/'));
        let first = own.and_then(|(j, within)| Some((j.parse::<usize>().ok()?, within)));
        match first {
            Some((group, within)) => {
                let layer = (group * self.layers).div_ceil(self.groups);
                before.path(&format!("{LAYERS}{layer}/{within}"))
            }
            None => before.path(path),
        }
    }
}

/// Whether a path is that of an optimizer's slot of a layer's variable, not of the variable.
pub fn is_slot(path: &str) -> bool {
    !matches!(path.rsplit('/').next(), Some("kernel" | "bias" | "scale" | "table"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(groups: usize) -> Groups {
        Groups { layers: 8, groups, shared: Shared::Layer }
    }

    #[test]
    fn layers_of_a_group_use_the_same_variables_and_others_are_left_alone() {
        assert_eq!(groups(2).path("encoder/layer.3/up/kernel"), "encoder/shared.2.0/up/kernel");
        assert_eq!(groups(2).path("encoder/layer.4/up/kernel/adam.m"), "encoder/shared.2.1/up/kernel/adam.m");
        assert_eq!(groups(8).path("encoder/layer.4/up/kernel"), "encoder/layer.4/up/kernel");
        assert_eq!(groups(1).path("embeddings/word/table"), "embeddings/word/table");
        let attention = Groups { shared: Shared::Attention, ..groups(1) };
        assert_eq!(attention.path("encoder/layer.3/up/kernel"), "encoder/layer.3/up/kernel");
        assert_eq!(attention.path("encoder/layer.3/attention_norm/bias"), "encoder/shared.1.0/attention_norm/bias");
    }

    #[test]
    fn a_variable_comes_from_that_which_its_layers_used_before() {
        for (before, after) in [(1, 2), (1, 8), (2, 4), (4, 8), (3, 8)] {
            for layer in 0..8 {
                let path = format!("encoder/layer.{layer}/up/kernel/adam.v");
                let (old, new) = (groups(before).path(&path), groups(after).path(&path));
                // Groups that do not divide follow their first layer.
                if after % before == 0 || after == 8 {
                    assert_eq!(groups(after).origin(&new, &groups(before)), old, "{before} -> {after}: {path}");
                }
            }
        }
    }
}
