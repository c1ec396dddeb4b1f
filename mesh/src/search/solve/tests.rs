//! The solver against every choice there is, and against an integer program.

use super::*;
use proptest::prelude::*;

/// Every choice, one after the other.
fn brute_force(problem: &Problem, budget: f64) -> Option<f64> {
    fn go(p: &Problem, at: &mut Vec<usize>, so_far: Label, budget: f64) -> f64 {
        let s = at.len();
        if s == p.segments.len() {
            return if so_far.kept + so_far.transient <= budget { so_far.seconds } else { f64::INFINITY };
        }
        let mut best = f64::INFINITY;
        for o in 0..p.segments[s].len() {
            at.push(o);
            let into = p.pairs.iter().filter(|q| q.of.iter().max() == Some(&s));
            let between: f64 = into.map(|q| p.seconds(q, q.of.map(|i| at[i]))).sum();
            for l in &p.segments[s][o] {
                let next = join(&so_far, &Label { seconds: l.seconds + between, ..*l });
                best = best.min(go(p, at, next, budget));
            }
            at.pop();
        }
        best
    }
    Some(go(problem, &mut vec![], Label::default(), budget)).filter(|s| s.is_finite())
}

/// Small numbers, so that sums are exact and ties are frequent.
fn problems() -> impl Strategy<Value = (Problem, f64)> {
    let label = (1u8..30, 0u8..20, 0u8..20).prop_map(|(s, k, t)| Label {
        seconds: s.into(),
        kept: k.into(),
        transient: t.into(),
        ..Label::default()
    });
    let options = prop::collection::vec(prop::collection::vec(label, 1..3), 1..4);
    (prop::collection::vec(options, 1..7), any::<u64>(), 10f64..100.0).prop_map(|(segments, bits, budget)| {
        let n = segments.len();
        let all = (0..n).flat_map(|b| (0..b).map(move |a| [a, b])).enumerate();
        // A chain, with some skips.
        let some = all.filter(|(i, [a, b])| a + 1 == *b || bits >> i & 3 == 3);
        let pairs = some.map(|(i, of)| {
            let size = segments[of[0]].len() * segments[of[1]].len();
            let value = |k: usize| ((bits.rotate_left((7 * i + 3 * k) as u32)) % 17) as f64;
            Pair { of, seconds: Arc::new((0..size).map(value).collect()) }
        });
        let pairs = pairs.collect();
        (Problem { segments: segments.into_iter().map(Arc::new).collect(), pairs }, budget)
    })
}

/// The same as an integer program: one label a segment, one pair of options for each two segments.
fn by_integers(problem: &Problem, budget: f64) -> Option<f64> {
    use good_lp::{Expression, Solution, SolverModel, constraint, microlp, variable, variables};
    let mut vars = variables!();
    let labels: Vec<Vec<Vec<_>>> = problem
        .segments
        .iter()
        .map(|s| s.iter().map(|o| o.iter().map(|_| vars.add(variable().binary())).collect()).collect())
        .collect();
    let joint: Vec<Vec<_>> =
        problem.pairs.iter().map(|p| p.seconds.iter().map(|_| vars.add(variable().min(0))).collect()).collect();
    let transient = vars.add(variable().min(0));
    let all = || {
        let of = |(s, vs): (&Arc<Vec<Vec<Label>>>, &Vec<Vec<good_lp::Variable>>)| {
            let flat: Vec<Label> = s.iter().flatten().copied().collect();
            flat.into_iter().zip(vs.iter().flatten().copied().collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        problem.segments.iter().zip(&labels).map(of).collect::<Vec<_>>()
    };
    let own: Expression = all().into_iter().flatten().map(|(l, v)| l.seconds * v).sum();
    let between = problem.pairs.iter().zip(&joint).flat_map(|(p, vs)| p.seconds.iter().zip(vs));
    let seconds: Expression = own + between.map(|(s, v)| *s * *v).sum::<Expression>();
    let mut model = vars.minimise(seconds.clone()).using(microlp);
    for segment in all() {
        model = model.with(constraint!(segment.iter().map(|(_, v)| *v).sum::<Expression>() == 1));
        let own: Expression = segment.iter().map(|(l, v)| l.transient * *v).sum();
        model = model.with(constraint!(own <= transient));
    }
    let option = |s: usize, o: usize| labels[s][o].iter().copied().sum::<Expression>();
    for (pair, vs) in problem.pairs.iter().zip(&joint) {
        let columns = problem.segments[pair.of[1]].len();
        for (i, v) in vs.iter().enumerate() {
            let both = option(pair.of[0], i / columns) + option(pair.of[1], i % columns);
            model = model.with(constraint!(both - 1 <= *v));
        }
    }
    let kept: Expression = all().into_iter().flatten().map(|(l, v)| l.kept * v).sum();
    let model = model.with(constraint!(kept + transient <= budget));
    model.solve().ok().map(|found| found.eval(seconds))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn an_integer_program_finds_the_same((problem, budget) in problems()) {
        let (found, other) = (problem.solve(budget, f64::INFINITY), by_integers(&problem, budget));
        prop_assert_eq!(found.is_some(), other.is_some());
        if let (Some(found), Some(other)) = (found, other) {
            prop_assert!((found.seconds - other).abs() < 1e-6, "{} and {other}", found.seconds);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn nothing_is_faster_than_what_is_found((problem, budget) in problems()) {
        for budget in [budget, f64::INFINITY] {
            let best = brute_force(&problem, budget);
            let found = problem.solve(budget, f64::INFINITY);
            prop_assert_eq!(found.as_ref().map(|f| f.seconds), best);
            if let Some(best) = best {
                prop_assert_eq!(problem.solve(budget, best * (1.0 + 1e-9)).map(|f| f.seconds), Some(best));
                prop_assert_eq!(problem.solve(budget, best - 0.5), None);
            }
            if let Some(found) = found {
                prop_assert!(found.memory <= budget && found.bound <= found.seconds);
                let at = |s: usize| found.chosen[s].0;
                let between: f64 = problem.pairs.iter().map(|p| problem.seconds(p, p.of.map(at))).sum();
                let within: Vec<f64> = (0..problem.segments.len())
                    .map(|s| problem.segments[s][at(s)].iter().map(|l| l.seconds).fold(f64::INFINITY, f64::min))
                    .collect();
                prop_assert!(between + within.iter().sum::<f64>() <= found.seconds);
                prop_assert!(problem.bound(budget.min(1e6), f64::INFINITY) <= found.seconds + 1e-9);
                prop_assert!(problem.least_memory() <= found.memory);
            }
        }
    }
}

impl Problem {
    /// The lower bound within a budget, whatever time that allows.
    fn bound(&self, budget: f64, most: f64) -> f64 {
        self.bounds(budget, most).map_or(f64::INFINITY, |b| b.bound)
    }

    /// Seconds, what is kept, and what comes and goes, of every choice.
    fn all(&self) -> Vec<Label> {
        let mut all = vec![(Label::default(), vec![])];
        for (s, options) in self.segments.iter().enumerate() {
            let with = |(so_far, at): &(Label, Vec<usize>)| {
                let next = |o: usize, l: &Label| {
                    let at = [&at[..], &[o]].concat();
                    let into = self.pairs.iter().filter(|q| q.of.iter().max() == Some(&s));
                    let between: f64 = into.map(|q| self.seconds(q, q.of.map(|i| at[i]))).sum();
                    (join(so_far, &Label { seconds: l.seconds + between, ..*l }), at)
                };
                let labels = options.iter().enumerate().flat_map(|(o, labels)| labels.iter().map(move |l| (o, l)));
                labels.map(|(o, l)| next(o, l)).collect::<Vec<_>>()
            };
            all = all.iter().flat_map(with).collect();
        }
        all.into_iter().map(|(label, _)| label).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn prices_bound_the_fastest_solution_from_both_sides((problem, budget) in problems()) {
        let best = brute_force(&problem, budget);
        let known = problem.bounds(budget, f64::INFINITY);
        prop_assert_eq!(known.is_some(), best.is_some());
        if let (Some(known), Some(best)) = (known, best) {
            prop_assert!(known.bound <= best + 1e-9, "{} and {best}", known.bound);
            let met = known.best.unwrap();
            prop_assert!(met.seconds >= best && met.memory <= budget);
            // It is a choice that there is.
            let of = |s: usize| &problem.segments[s][met.chosen[s].0];
            let own = |some: &dyn Fn(&Label) -> f64| {
                (0..problem.segments.len()).map(|s| of(s).iter().map(some).fold(f64::INFINITY, f64::min)).sum::<f64>()
            };
            let between: f64 = problem.pairs.iter().map(|p| problem.seconds(p, p.of.map(|s| met.chosen[s].0))).sum();
            prop_assert!(own(&|l| l.seconds) + between <= met.seconds && own(&|l| l.kept) <= met.memory);
        }
    }

    #[test]
    fn no_price_gives_a_better_bound((problem, budget) in problems()) {
        if let Some(Bounds { bound, .. }) = problem.bounds(budget, f64::INFINITY) {
            let least = |s: &Arc<Vec<Vec<Label>>>| s.iter().flatten().map(|l| l.transient).fold(f64::INFINITY, f64::min);
            let room = budget - problem.segments.iter().map(least).fold(0.0, f64::max);
            let all = problem.all();
            for price in (0..400).map(|i| f64::from(i) * 0.05) {
                let of_price = all.iter().map(|l| l.seconds + price * (l.kept - room)).fold(f64::INFINITY, f64::min);
                prop_assert!(of_price <= bound * (1.0 + 1e-6), "{of_price} at {price}, and {bound}");
            }
        }
    }

    #[test]
    fn least_memory_is_what_some_solution_needs_and_none_less((problem, _) in problems()) {
        let least = problem.all().iter().map(|l| l.kept + l.transient).fold(f64::INFINITY, f64::min);
        prop_assert_eq!(problem.least_memory(), least);
        prop_assert_eq!(problem.solve(least, f64::INFINITY).map(|s| s.memory), Some(least));
        prop_assert_eq!(problem.solve(least - 0.5, f64::INFINITY), None);
    }

    #[test]
    fn labels_that_stay_are_those_that_no_other_one_dominates(
        numbers in prop::collection::vec([0u8..6, 0u8..6, 0u8..6], 0..40),
    ) {
        let label = |n: &[u8; 3]| {
            let [seconds, kept, transient] = n.map(f64::from);
            Label { seconds, kept, transient, ..Label::default() }
        };
        let (mut one_by_one, mut at_once) = (vec![], numbers.iter().map(|n| (label(n), ())).collect());
        numbers.iter().for_each(|n| insert(&mut one_by_one, label(n)));
        eliminate::undominated(&mut at_once);
        let at_once: Vec<Label> = at_once.into_iter().map(|(l, ())| l).collect();
        one_by_one.sort_by(|a, b| [a.seconds, a.kept, a.transient].partial_cmp(&[b.seconds, b.kept, b.transient]).unwrap());
        prop_assert_eq!(one_by_one, at_once);
    }
}

#[test]
fn what_takes_forever_is_not_found_however_small_it_is() {
    let label = |seconds, kept| vec![Label { seconds, kept, ..Label::default() }];
    let options = Arc::new(vec![label(1.0, 5.0), label(2.0, 1.0)]);
    let segments = vec![options.clone(), options];
    let never = f64::INFINITY;
    let of = |seconds| Pair { of: [0, 1], seconds: Arc::new(seconds) };
    let solve = |seconds, budget| {
        let problem = Problem { segments: segments.clone(), pairs: vec![of(seconds)] };
        problem.solve(budget, f64::INFINITY).map(|s| (s.seconds, s.memory))
    };
    assert_eq!(solve(vec![0.0, 1.0, 2.0, never], 10.0), Some((2.0, 10.0)));
    assert_eq!(solve(vec![0.0, 1.0, 2.0, never], 9.0), Some((4.0, 6.0)));
    assert_eq!(solve(vec![0.0, 1.0, 2.0, never], 5.0), None);
    assert_eq!(solve(vec![never; 4], 10.0), None);
}
