//! `floor`: an allowed frame's judgement in steps, each a program that does all that those before it
//! do and one thing more (ebpf/programs/bench/steps.rs); last, the guard's own program. What a step
//! adds is what that part costs; they overlap in the processor, so less than it would cost alone.

use anyhow::{Context, Result};
use aya::programs::SchedClassifier;
use omerta_dataplane::{PolicyStore, Programs};
use omerta_kernel_tests::{allowlist, config};
use omerta_verdict::{Direction, Mode};

use crate::kernel::{self, Kind};
use crate::report::Bench;
use crate::rounds::{Case, Rounds};
use crate::table::OBJECT;
use crate::verdict::{NEXT, allowed_frame, judge, loaded, run};

const BASE: &str = "empty";
/// (row, program)
const STEPS: [(&str, &str); 7] = [
    ("bounds", "step_bounds"),
    ("+ nothing pending", "step_plain"),
    ("+ headers", "step_headers"),
    ("+ policy", "step_policy"),
    ("+ allowlist", "step_list"),
    ("+ flow noted", "step_flow"),
    ("+ counters", "step_count"),
];

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let empty = kernel::constant(Kind::Classifier, NEXT)?;
    let frame = allowed_frame();
    let mut whole = loaded(Mode::Filtered)?;
    let mut steps = Programs::fitted(OBJECT, &[], &[])?;
    PolicyStore::of(&steps, "bench")?
        .commit(config(Mode::Filtered).policy("bench")?, &allowlist())?;
    for (_, name) in STEPS {
        let program: &mut SchedClassifier = steps
            .object_mut()
            .program_mut(name)
            .with_context(|| format!("the program {name}"))?
            .try_into()?;
        program
            .load()
            .with_context(|| format!("load the program {name}"))?;
    }
    let object = steps.object();
    let frame = &frame;
    let mut cases = vec![Case::new(BASE, BASE, || run(&empty, frame, NEXT))];
    for (row, name) in STEPS {
        cases.push(Case::new(row, BASE, move || {
            let program: &SchedClassifier = object
                .program(name)
                .with_context(|| format!("the program {name}"))?
                .try_into()?;
            run(program.fd()?, frame, NEXT)
        }));
    }
    cases.push(Case::new("guard", BASE, || {
        judge(&mut whole, Direction::Egress, frame, NEXT)
    }));
    let samples = rounds.run(cases)?;
    Ok(Bench::of("floor", "ns", &rounds, &samples, Vec::new()))
}
