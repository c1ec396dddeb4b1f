//! Every mistake in a mesh or a layout is an error with a code, a place in the model's source and a way out.

use mesh::dim::{DType, dim};
use mesh::error::{Error, Place};
use mesh::graph::{Graph, Tensor};
use mesh::layout::{Layout, Mesh, Section};
use mesh::ops::Prim;
use mesh::ops::binary::BinaryFn;
use mesh::placement::{Placement, Subject};
use mesh::plan::{Backend, PlanOptions, ProgramPlan, Work, plan_program};
use mesh::program::{Init, Program, ProgramBuilder};

/// A backend without scratch, with a kibibyte of workspace.
struct Plain;

impl Backend for Plain {
    fn scratch_bytes(&self, _: &Work) -> usize {
        0
    }
    fn workspace_bytes(&self) -> usize {
        1024
    }
}

fn plan_within(p: &Program, mesh: &str, layout: &str, options: &PlanOptions) -> Result<ProgramPlan, Error> {
    plan_program(p, &mesh.parse()?, &layout.parse()?, options, &Plain)
}

/// An error as it is printed, its places without columns.
fn printed(error: &Error) -> String {
    let text = error.to_string();
    let mut parts = text.split("layouts.rs:");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let line = part.find(':').unwrap();
        let rest = part[line + 1..].trim_start_matches(|c: char| c.is_ascii_digit());
        out += &format!("layouts.rs:{}{rest}", &part[..line]);
    }
    out
}

/// The printed mistake of a layout.
fn mistake(p: &Program, mesh: &str, layout: &str) -> String {
    printed(&plan_within(p, mesh, layout, &PlanOptions::default()).expect_err("the layout is accepted"))
}

/// How a line of this file is printed.
fn at(line: u32) -> String {
    format!("  --> mesh/tests/layouts.rs:{line}")
}

/// The caller's line.
#[track_caller]
fn here() -> u32 {
    Place::here().line
}

/// A program of one function.
fn program(build: impl Fn(&Graph, &Tensor)) -> Program {
    let mut p = ProgramBuilder::new();
    p.function("f", |g| build(g, &g.input("image", DType::F32, &[dim("batch", 4), dim("x", 16), dim("channel", 3)])))
        .unwrap();
    p.finish().unwrap()
}

/// The line of `program` that makes the input.
const INPUT: u32 = 61;

fn small() -> Program {
    program(|g, x| g.output("y", &x.tanh()))
}

#[test]
fn an_unknown_axis() {
    let p = small();
    assert_eq!(
        mistake(&p, "data=2, x=2", "batch:dta"),
        format!(
            "error[L0002]: layout rule `batch:dta` names the axis `dta`, which the mesh `data=2,x=2` does not have\n\
             {}\n  help: did you mean `data`?",
            at(INPUT)
        )
    );
    assert!(mistake(&p, "data=2", "x:rows").ends_with("help: add the axis to the mesh, or take the rule out"));
    assert!(mistake(&p, "1", "x:rows").starts_with("error[L0002]"));
}

#[test]
fn an_unknown_dimension() {
    let p = small();
    assert_eq!(
        mistake(&p, "data=2", "chanel:data"),
        format!(
            "error[L0003]: layout rule `chanel:data` names the dimension `chanel`, which no tensor of the program \
             has\n{}\n  = the dimensions are batch, channel, x\n  help: did you mean `channel`?",
            at(INPUT)
        )
    );
    // Nothing is near: no place, but all there are.
    assert_eq!(
        mistake(&p, "data=2", "vocabulary:data"),
        "error[L0003]: layout rule `vocabulary:data` names the dimension `vocabulary`, which no tensor of the program \
         has\n  = the dimensions are batch, channel, x\n  help: take the rule out"
    );
}

#[test]
fn two_rules_for_one_dimension() {
    assert_eq!(
        mistake(&small(), "a=2,b=2", "x:a, batch:b, x:b"),
        "error[L0004]: the layout has two rules for dimension `x`\n  = in the layout `x:a, batch:b, x:b`\n  help: keep \
         one of them"
    );
}

#[test]
fn two_dimensions_of_a_tensor_on_one_axis() {
    let line = here() + 1;
    let p = program(|g, x| g.output("y", &x.max(&["channel"])));
    assert_eq!(
        mistake(&p, "a=2", "x:a,batch:a"),
        format!(
            "error[L0005]: dimensions `batch` and `x` of input f32[batch:4, x:16, channel:3] both lie on the mesh axis \
             `a`\n{}\n  help: map only one of `batch` and `x` to this axis, or override this tensor's layout",
            at(INPUT)
        )
    );
    // Dimensions that meet only later are found where they meet.
    let meet = here() + 3;
    let p = program(|g, x| {
        let other = g.input("other", DType::F32, &[dim("classes", 8)]);
        g.output("y", &x.mul(&other));
    });
    let text = mistake(&p, "a=2", "x:a,classes:a");
    assert!(text.contains("of mul f32[batch:4, x:16, channel:3, classes:8]"), "{text}");
    assert!(text.contains(&at(meet)), "{text}");
    assert!(line < meet);
}

#[test]
fn a_variable_with_two_dimensions_on_one_axis() {
    let line = here() + 2;
    let p = program(|g, x| {
        let w = g.variable("w", &[dim("channel", 3), dim("hidden", 8)], Init::zeros());
        g.output("y", &x.contract(&w, &["channel"]));
    });
    assert_eq!(
        mistake(&p, "a=2", "channel:a,hidden:a"),
        format!(
            "error[L0005]: dimensions `channel` and `hidden` of variable f32[channel:3, hidden:8] both lie on the mesh \
             axis `a`\n{}\n  help: map only one of `channel` and `hidden` to this axis, or override this tensor's layout",
            at(line)
        )
    );
}

#[test]
fn a_mesh_of_another_size_than_there_are_devices() {
    let options = PlanOptions { devices: Some(6), ..PlanOptions::default() };
    let error = plan_within(&small(), "data=2,x=2", "batch:data", &options).unwrap_err();
    assert_eq!(
        error.to_string(),
        "error[L0006]: the mesh `data=2,x=2` has 4 places, but there are 6 devices\n  help: make the axis sizes multiply \
         to 6, or change the number of devices"
    );
}

#[test]
fn more_shards_than_chunks() {
    assert_eq!(
        mistake(&small(), "a=4", "channel:a"),
        format!(
            "error[L0007]: dimension `channel` (size 3, 3 chunks) of input f32[batch:4, x:16, channel:3] cannot be split \
             over the mesh axis `a` (size 4)\n{}\n  help: use a mesh with a=3 or less there, let it stay whole \
             where it must, `channel:a?`, or give the program more chunks (`--chunks`)",
            at(INPUT)
        )
    );
    // A dimension that shrinks is refused where it has become too small.
    let line = here() + 1;
    let p = program(|g, x| g.output("y", &x.slice("x", 0, 2)));
    let text = mistake(&p, "a=4", "x:a");
    assert!(text.contains("dimension `x` (size 2, 2 chunks) of slice") && text.contains(&at(line)), "{text}");
}

#[test]
fn text_that_is_no_mesh_or_layout() {
    let mesh = |text: &str| text.parse::<Mesh>().unwrap_err().to_string();
    let layout = |text: &str| text.parse::<Layout>().unwrap_err().to_string();
    assert_eq!(
        mesh("data=2, x"),
        "error[L0001]: `x` is not an axis with its size, such as `x=2` in `data=2, x=2`\n  = in the mesh `data=2, x`"
    );
    assert_eq!(
        layout("batch:data, x-x"),
        "error[L0001]: `x-x` is not a rule dimension:axis, such as `x:x` in `batch:data, x:x`\n  = in the layout \
         `batch:data, x-x`"
    );
    for text in ["x=0", "x=-1", "x=2=3", "=2", "x=99999999999", "2", "x=2;y=2", "x=1048576,y=2"] {
        assert!(mesh(text).starts_with("error[L0001]"), "{text}: {}", mesh(text));
    }
    for text in [
        "x",
        ":",
        "x:",
        ":x",
        "x:y:z",
        "x y:z",
        "x:a+",
        "x:?",
        "x:none?",
        "x:a+none",
        "x:a+a",
        "x:a??",
        "x:a}",
        "a{x:a",
        "{x:a}",
        "a b{x:a}",
        "//a{x:a}",
        "a{b{x:a}}",
        "slots{slots{x:a}}",
        "a{slots{x:a}}",
    ] {
        assert!(layout(text).starts_with("error[L0001]"), "{text}: {}", layout(text));
    }
    assert!(mesh("x=2,x=3").starts_with("error[P0003]: there are two mesh axes called `x`\n  = in the mesh `x=2,x=3`"));
}

#[test]
fn mistakes_in_a_tensors_own_rules() {
    let own = |rules: &'static str| program(move |g, x| g.output("y", &x.tanh().with_layout(rules)));
    let text = |rules: &'static str| mistake(&own(rules), "data=2,model=2", "batch:data");
    // The line of `own`, where the tensor is made.
    let place = at(here() - 3);
    assert_eq!(
        text("chanel:model"),
        format!(
            "error[L0003]: layout rule `chanel:model` names the dimension `chanel`, which tanh f32[batch:4, x:16, \
             channel:3] does not have\n{place}\n  help: did you mean `channel`?"
        )
    );
    assert!(text("channel:modl").starts_with("error[L0002]: layout rule `channel:modl` names the axis `modl`"));
    for (rules, code, help) in [
        ("channel:modl", "L0002", "did you mean `model`?"),
        ("x:model,batch:model", "L0005", "map only one of `batch` and `x`"),
        ("x:model,x:data", "L0004", "keep one of them"),
        ("channel=model", "L0001", ""),
    ] {
        let text = text(rules);
        assert!(text.starts_with(&format!("error[{code}]")), "{text}");
        assert!(text.contains(&place) && text.contains(help), "{text}");
    }
    let three = mistake(&own("channel:model"), "data=2,model=4", "batch:data");
    assert!(three.starts_with("error[L0007]") && three.contains(&place), "{three}");
    let fine = plan_within(&own("x:model"), "data=2,model=2", "batch:data", &PlanOptions::default());
    assert!(fine.is_ok());
}

#[test]
fn a_plan_over_the_budget_names_what_is_large_and_where_it_comes_from() {
    let line = here() + 2;
    let p = program(|g, x| {
        let w = g.variable("w", &[dim("channel", 3), dim("hidden", 100)], Init::zeros());
        let y = x.contract(&w, &["channel"]);
        g.output("y", &y.max(&["x"]));
    });
    let with = |memory| plan_within(&p, "a=2", "x:a", &PlanOptions { memory: Some(memory), ..PlanOptions::default() });
    let needed = with(usize::MAX).unwrap().peak_bytes(0);
    assert!(with(needed).is_ok());
    let (product, largest, variable) = (4 * 8 * 100 * 4, 4 * 100 * 4, 3 * 100 * 4);
    let said = |n: usize| format!("{:.1} KiB ({} bytes)", n as f64 / 1024.0, mesh::plan::describe::thousands(n as u64));
    assert_eq!(
        printed(&with(needed - 1).unwrap_err()),
        format!(
            "error[M0001]: device 0 needs {}, but may use {}\n  \
             = {}: contract f32[batch:4, x:8, hidden:100] (mesh/tests/layouts.rs:{})\n  \
             = {}: reduce_max f32[batch:4, hidden:100] (mesh/tests/layouts.rs:{})\n  \
             = {}: variable w f32[channel:3, hidden:100] (mesh/tests/layouts.rs:{line})\n  \
             = in function `f`, with 1.0 KiB for the workspaces of threads\n  help: split more dimensions over more \
             devices, use a smaller crop or batch, put the large ones in a recompute region, or raise the budget",
            said(needed),
            said(needed - 1),
            said(product),
            line + 1,
            said(largest),
            line + 2,
            said(variable),
        )
    );
    // The device with the highest need is named: an uneven split gives the first ones more.
    let p = program(|g, x| g.output("y", &x.slice("x", 0, 5).exp()));
    let options = PlanOptions { memory: Some(1100), ..PlanOptions::default() };
    let text = plan_within(&p, "a=3", "x:a", &options).unwrap_err().to_string();
    assert!(text.starts_with("error[M0001]: device 0 needs "), "{text}");
}

#[test]
fn an_optional_rule_gives_way_and_a_tensor_chooses_a_dimension_that_is_free() {
    let place = |layout: &str, dims: &[(&str, usize)]| {
        let dims: Vec<_> = dims.iter().map(|(n, s)| dim(*n, *s)).collect();
        let p = program(|g, x| {
            g.output("y", x);
            g.output("w", &g.scoped("a/b", || g.variable("w", &dims, Init::zeros())));
        });
        let (mesh, layout): (Mesh, Layout) = ("m=2,n=3".parse().unwrap(), layout.parse().unwrap());
        layout.check(&mesh, &p).unwrap();
        let spec = Placement::new(&mesh, &layout, &p).spec(&Subject::variable(&p.variables[0])).unwrap();
        let over = |axes: &Vec<usize>| axes.iter().map(|a| &*mesh.axes()[*a].0).collect::<Vec<_>>().join("+");
        spec.dims.iter().map(over).collect::<Vec<_>>().join(",")
    };
    let w = [("channel", 3), ("hidden", 8)];
    for (layout, split) in [
        ("channel:n, hidden:m", "n,m"),
        ("hidden:m+n", ",m+n"),
        // Three chunks are too few for six shards, and an axis is taken once.
        ("channel:m+n?", ","),
        ("channel:n?, hidden:n", ",n"),
        ("channel:n?, hidden:n+m?", "n,"),
        ("*:n", ",n"),
        ("*:m+n", ",m+n"),
        ("hidden:m, *:n", "n,m"),
        ("hidden:m, *:m", ",m"),
        ("hidden:none, *:n", "n,"),
        ("hidden:none, *:m+n", ","),
        // Scope before section before all; of equals the last.
        ("hidden:m, variables{hidden:n}", ",n"),
        ("a/**{hidden:m}, variables{hidden:n}", ",m"),
        ("variables{hidden:n, a/**{hidden:n+m}}, a/b{hidden:m}", ",n+m"),
        ("a/*{hidden:m}, **{hidden:n}", ",n"),
        ("**{hidden:n}, a/b/w{hidden:m}", ",m"),
        ("variables{*:n}, a/b{*:none}", ","),
        ("variables{hidden:n}, activations{channel:m}, hidden:none", ",n"),
        ("slots{hidden:n}, hidden:m", ",m"),
    ] {
        assert_eq!(place(layout, &w), split, "{layout}");
    }
    // Of equal dimensions the first by name, in whatever order they are.
    assert_eq!(place("*:m", &[("v", 8), ("u", 8)]), ",m");
    assert_eq!(place("*:m", &[("u", 8), ("v", 8)]), "m,");
}

#[test]
fn a_table_of_rules() {
    let table = "batch = \"data+x?\"\n[slots]\n\"*\" = \"data\"\n[slots.\"decoder/**\"]\nx = \"none\"\n[\"b/**\"]\nx = \"y\"\n[\"a/**\"]\nx = \"z\"\n";
    let layout: Layout = toml::from_str(table).unwrap();
    assert_eq!(layout.to_string(), "batch:data+x?,slots{*:data,decoder/**{x:none}},b/**{x:y},a/**{x:z}");
    let built = Layout::default().with("batch:data+x?").unwrap();
    let built = built.section(Section::Slots, "*:data, decoder/**{ x:none }").unwrap();
    assert_eq!(built.scope("b/**", "x:y").unwrap().scope("a/**", "x:z").unwrap(), layout);
    let error = toml::from_str::<Layout>("x = \"a+\"").unwrap_err().to_string();
    assert!(error.contains("error[L0001]: `x:a+`"), "{error}");
    assert!(toml::from_str::<Layout>("x = 3").unwrap_err().to_string().contains("layout rules: a text, or a table"));
}

#[test]
fn the_sum_of_the_gradients_of_a_value_is_in_the_scope_of_the_value() {
    let p = program(|g, x| {
        let y = g.scoped("inside", || x.exp());
        let z = g.scoped("outside", || y.sin().mul(&y.cos()));
        g.output("dx", &g.gradients(&z.sum_all(), &[x])[0]);
    });
    let nodes = p.function("f").unwrap().nodes.iter();
    let sums = nodes.filter(|n| matches!(&n.op, Prim::Binary(b) if b.f == BinaryFn::Add));
    assert_eq!(sums.map(|n| &*n.scope).collect::<Vec<_>>(), ["inside"]);
}

#[test]
fn the_book_has_one_layout_as_a_table_and_in_rust() {
    #[derive(serde::Deserialize)]
    struct Config {
        mesh: String,
        layout: Layout,
    }
    let book = include_str!("../../docs/layouts.md");
    let (_, rest) = book.split_once("```toml\n").unwrap();
    let config: Config = toml::from_str(rest.split_once("```").unwrap().0).unwrap();
    let layout = Layout::default().with("batch:data, d_ff:model").unwrap();
    let layout = layout.section(Section::Slots, "*:data").unwrap().scope("layer.*/**", "seq:model?").unwrap();
    assert_eq!(config.layout, layout);
    let p = program(|g, x| {
        let x = g.scoped("layer.0", || x.rename("x", "seq").rename("channel", "d_ff").tanh());
        g.output("y", &x.pad("d_ff", 0, 1, 0.0));
    });
    plan_within(&p, &config.mesh, &layout.to_string(), &PlanOptions::default()).unwrap();
}

/// The reasons that a layout gives for the tensor which an op makes.
fn why(p: &Program, mesh: &str, layout: &str, op: &str) -> Vec<String> {
    let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
    let f = p.function("f").unwrap();
    let node = f.nodes.iter().find(|n| n.op.op().name() == op).unwrap();
    Placement::new(&mesh, &layout, p).why(&Subject::node(f, node))
}

#[test]
fn why_a_tensor_lies_as_it_does_is_said_with_the_rule_that_decided() {
    let p = small();
    let input = |mesh: &str, layout: &str| why(&p, mesh, layout, "input").join("; ");
    assert_eq!(input("a=2", ""), "it is whole: no rule is about its dimensions");
    assert_eq!(input("a=2", "x:a"), "`x` is split over a by the rule `x:a`");
    assert_eq!(
        input("a=2", "x:none, batch:a"),
        "`batch` is split over a by the rule `batch:a`; `x` is whole by the rule `x:none`"
    );
    assert_eq!(input("a=2", "*:a"), "`x` is split over a by the rule `*:a`, as the largest that can be");
    assert_eq!(input("a=2,b=2", "x:a+b"), "`x` is split over a+b by the rule `x:a+b`");
    let block = "activations{batch:a}";
    assert_eq!(input("a=2", block), format!("`batch` is split over a by the rule `{block}`"));
    let gives_way = "`batch` is split over a by the rule `batch:a`; \
                     `x` is whole: the rule `x:a?` gives way, since `batch` has the axis `a`";
    assert_eq!(input("a=2", "batch:a, x:a?"), gives_way);
    let few = "`channel` is whole: the rule `channel:a?` gives way, since 3 chunks are too few for 4 devices";
    assert_eq!(input("a=4", "channel:a?"), few);
    assert_eq!(input("a=1,b=2", "x:a"), "`x` is whole: the axes of the rule `x:a` have a size of 1");
    assert_eq!(input("a=2", "@a:1"), "it lies at place 1 along a by the rule `@a:1`");
    let own = program(|g, x| g.output("y", &x.tanh().with_layout("x:a")));
    assert_eq!(why(&own, "a=2", "batch:a", "tanh"), ["`x` is split over a by its own rule `x:a`"]);
    let sorted = program(|g, x| g.output("y", &x.top_k("x", &dim("k", 8)).1));
    let whole = why(&sorted, "a=2", "k:a?", "top_k").join("");
    assert!(whole.starts_with("`k` is whole in spite of the rule `k:a?`: the elements of one order"), "{whole}");
}
