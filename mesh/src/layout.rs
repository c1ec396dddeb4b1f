//! Meshes, layouts and who owns what.

use crate::chunk::shard_chunks;
use crate::dim::{Name, Type, is_name};
use crate::error::{Cause, Error, Place, nearest};
use crate::program::{Chunking, Program};
use crate::region::Region;
use std::collections::BTreeMap;
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
            if !is_name(name) || size == 0 || size > 1 << 20 {
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

/// Layout rules: which dimension is split over which mesh axis, `batch:data, x:x`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout {
    rules: Vec<(Name, Name)>,
}

impl Layout {
    /// The rules in order: dimension, axis.
    pub fn rules(&self) -> &[(Name, Name)] {
        &self.rules
    }
    /// The axis of a dimension.
    pub fn axis_of(&self, dim: &str) -> Option<&Name> {
        self.rules.iter().find(|(d, _)| *d == dim).map(|(_, a)| a)
    }

    /// The rules that concern a part of a program. One that names nothing in the whole of it stays, to be refused.
    pub fn of(&self, part: &Program, whole: &Program) -> Layout {
        let (part, whole) = (dimensions(part), dimensions(whole));
        let concerns = |d: &str| part.contains_key(d) || !whole.contains_key(d);
        Layout { rules: self.rules.iter().filter(|(d, _)| concerns(d)).cloned().collect() }
    }

    /// Checks the rules against mesh and program.
    ///
    /// # Errors
    /// A rule that names an axis the mesh does not have or a dimension that no tensor of the program has; at the place
    /// of the first tensor with the rule's dimension (or the one that is nearest).
    pub fn check(&self, mesh: &Mesh, program: &Program) -> Result<(), Error> {
        let dims = dimensions(program);
        let here = |dim: Option<&str>, e: Error| match dim.and_then(|d| dims.get(d)) {
            Some(place) => e.at(*place),
            None => e,
        };
        for (dim, axis) in &self.rules {
            let rule = format!("{dim}:{axis}");
            if mesh.axis(axis).is_none() {
                let near = nearest(axis, mesh.axes.iter().map(|(n, _)| &**n)).map(Name::from);
                let cause = Cause::UnknownAxis { rule, axis: axis.clone(), mesh: mesh.to_string(), nearest: near };
                return Err(here(Some(&**dim), cause.into()));
            }
            if !dims.contains_key(&**dim) {
                let near = nearest(dim, dims.keys().copied());
                let cause =
                    Cause::UnknownDimension { rule, dim: dim.clone(), tensor: None, nearest: near.map(Name::from) };
                let mut e = here(near, cause.into());
                if dims.len() <= 40 {
                    e = e.note(format!("the dimensions are {}", dims.into_keys().collect::<Vec<_>>().join(", ")));
                }
                return Err(e);
            }
        }
        Ok(())
    }
}

/// The dimensions of a program, each with the place of a tensor that has it.
fn dimensions(program: &Program) -> BTreeMap<&str, Place> {
    // The functions that the user wrote come first, for the places.
    let functions = program.functions.values().filter(|f| f.name != "init");
    let nodes = functions.flat_map(|f| f.nodes.iter().map(|n| (&n.ty, n.place)));
    let variables = program.variables.iter().map(|v| (&v.ty, v.place));
    let mut dims = BTreeMap::new();
    for (ty, place) in nodes.chain(variables) {
        ty.dims.iter().for_each(|d| {
            dims.entry(&*d.name).or_insert(place);
        });
    }
    dims
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (d, a)) in self.rules.iter().enumerate() {
            write!(f, "{}{d}:{a}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for Layout {
    type Err = Error;
    fn from_str(text: &str) -> Result<Layout, Error> {
        let mut rules: Vec<(Name, Name)> = Vec::new();
        for part in text.split(',').filter(|p| !p.trim().is_empty()) {
            let (dim, axis) = part.split_once(':').map(|(d, a)| (d.trim(), a.trim())).unwrap_or(("", ""));
            if axis.contains('+') {
                let help = format!("map `{dim}` to one axis");
                let what = format!("several axes for one dimension (`{}`)", part.trim());
                return Err(inside(Cause::NotYet { what, help }.into(), "layout", text, part));
            }
            if !is_name(dim) || !is_name(axis) {
                let expected = "a rule dimension:axis, such as `x:x` in `batch:data, x:x`".into();
                return Err(inside(Cause::Syntax { text: part.trim().into(), expected }.into(), "layout", text, part));
            }
            if rules.iter().any(|(d, _)| *d == dim) {
                return Err(inside(Cause::TwoRules { dim: dim.into() }.into(), "layout", text, part));
            }
            rules.push((dim.into(), axis.into()));
        }
        Ok(Layout { rules })
    }
}

/// The mesh axis of each dimension of one tensor; None where it is not split.
pub type Spec = Vec<Option<usize>>;

/// A mesh with the rules that apply to a program: answers who owns what.
pub struct Placement<'a> {
    /// The mesh.
    pub mesh: &'a Mesh,
    /// The rules.
    pub layout: &'a Layout,
    /// The program's chunks.
    pub chunking: &'a Chunking,
}

impl Placement<'_> {
    /// The mesh axis that a rule of `layout` gives a dimension; axes of size 1 split nothing.
    pub fn axis(&self, layout: &Layout, dim: &str) -> Option<usize> {
        let axis = self.mesh.axis(layout.axis_of(dim)?)?;
        (self.mesh.axes[axis].1 > 1).then_some(axis)
    }

    /// How a tensor is split: by its own rules if it has any, else by the layout's; never along `whole` dimensions.
    ///
    /// # Errors
    /// Two dimensions on one axis, more shards than chunks, a mistyped rule of the tensor's own.
    pub fn spec(&self, what: &str, ty: &Type, own: Option<&str>, whole: &[Name], place: Place) -> Result<Spec, Error> {
        let own: Option<Layout> = own.map(str::parse).transpose().map_err(|e: Error| e.at(place))?;
        if let Some(own) = &own {
            self.check_own(own, what, ty, place)?;
        }
        let layout = own.as_ref().unwrap_or(self.layout);
        let mut spec: Spec = vec![None; ty.dims.len()];
        for (i, d) in ty.dims.iter().enumerate().filter(|(_, d)| !whole.contains(&d.name)) {
            let Some(axis) = self.axis(layout, &d.name) else { continue };
            let name = || self.mesh.axes[axis].0.clone();
            let tensor = || format!("{what} {ty}");
            if let Some(first) = spec.iter().position(|s| *s == Some(axis)) {
                let (first, second) = (ty.dims[first].name.clone(), d.name.clone());
                return Err(Error::from(Cause::AxisTwice { tensor: tensor(), axis: name(), first, second }).at(place));
            }
            let (chunks, shards) = (self.chunking.count(&d.name, d.size), self.mesh.axes[axis].1);
            if chunks < shards {
                let cause = Cause::MoreShardsThanChunks {
                    tensor: tensor(),
                    dim: d.name.clone(),
                    size: d.size,
                    chunks,
                    axis: name(),
                    shards,
                };
                return Err(Error::from(cause).at(place));
            }
            spec[i] = Some(axis);
        }
        Ok(spec)
    }

    fn check_own(&self, own: &Layout, what: &str, ty: &Type, place: Place) -> Result<(), Error> {
        for (dim, axis) in &own.rules {
            let rule = format!("{dim}:{axis}");
            if self.mesh.axis(axis).is_none() && self.layout.rules.iter().all(|(_, a)| a != axis) {
                let near = nearest(axis, self.mesh.axes.iter().map(|(n, _)| &**n)).map(Name::from);
                let cause = Cause::UnknownAxis { rule, axis: axis.clone(), mesh: self.mesh.to_string(), nearest: near };
                return Err(Error::from(cause).at(place));
            }
            if !ty.has(dim) {
                let near = nearest(dim, ty.dims.iter().map(|d| &*d.name)).map(Name::from);
                let tensor = Some(format!("{what} {ty}").into());
                let cause = Cause::UnknownDimension { rule, dim: dim.clone(), tensor, nearest: near };
                return Err(Error::from(cause).at(place));
            }
        }
        Ok(())
    }

    /// The elements of a dimension that a device owns when the dimension is split over `axis`.
    pub fn owned(&self, dim: &crate::dim::Dim, axis: Option<usize>, device: usize) -> std::ops::Range<usize> {
        let Some(axis) = axis else { return 0..dim.size };
        let chunks = self.chunking.count(&dim.name, dim.size);
        let own = shard_chunks(chunks, self.mesh.axes[axis].1, self.mesh.coordinates(device)[axis]);
        own.start * dim.size / chunks..own.end * dim.size / chunks
    }

    /// The part of a tensor that each device owns.
    pub fn regions(&self, ty: &Type, spec: &Spec) -> Vec<Region> {
        (0..self.mesh.size())
            .map(|d| {
                Region(ty.dims.iter().zip(spec).map(|(dim, a)| (dim.name.clone(), self.owned(dim, *a, d))).collect())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn meshes_and_layouts_read_back_as_they_are_written(axes in prop::collection::btree_map("[a-z]{1,5}", 1usize..9, 0..4)) {
            let text = axes.iter().map(|(n, s)| format!("{n}={s}")).collect::<Vec<_>>().join(", ");
            let mesh: Mesh = text.parse().unwrap();
            prop_assert_eq!(mesh.to_string().parse::<Mesh>().unwrap(), mesh.clone());
            prop_assert_eq!(mesh.size(), axes.values().product::<usize>());
            let rules = axes.keys().map(|n| format!("{n}_dim:{n}")).collect::<Vec<_>>().join(" , ");
            let layout: Layout = rules.parse().unwrap();
            prop_assert_eq!(layout.to_string().parse::<Layout>().unwrap(), layout);
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,40}") {
            let _ = text.parse::<Mesh>();
            let _ = text.parse::<Layout>();
        }

        #[test]
        fn shards_tile_every_dimension(size in 8usize..100, p in 1usize..9) {
            let mesh: Mesh = format!("a={p}").parse().unwrap();
            let layout: Layout = "x:a".parse().unwrap();
            let place = Placement { mesh: &mesh, layout: &layout, chunking: &Chunking::default() };
            let d = crate::dim::dim("x", size);
            let mut next = 0;
            for i in 0..p {
                let r = place.owned(&d, place.axis(&layout, "x"), i);
                prop_assert_eq!(r.start, next);
                next = r.end;
            }
            prop_assert_eq!(next, size);
        }
    }
}
