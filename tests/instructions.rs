//! What a device costs, in instructions: unlike a time, a count of them does not depend on the machine's mood.
//!
//! The counts are valgrind's, of the debug binary, which is there anyway; they are some ten times those of a release. What
//! does not depend on the number of devices is subtracted. From run to run they differ by less than one in a thousand, but
//! by more from compiler to compiler and from processor to processor: so a budget is half as much again as was measured on
//! x86_64 with Rust 1.95. What it is there to catch costs more than that: devices that are read and mapped again though
//! they are as they were (4 times as much by a refresh), or each compared with all others.

pub mod support {
    pub mod cloud;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
}

use std::fs;

use serde_json::json;
use support::cloud::Cloud;
use support::fleet::many;
use support::sidecar::{PATIENCE, Sidecar};
use support::tools;

/// Instructions that a device may cost from a start to the first file.
const COLD: u64 = 970_000;
/// Instructions that a device may cost by a refresh at which one in a hundred has changed.
const CHANGED: u64 = 220_000;
/// Instructions that a request may cost that is answered by 304.
const REQUEST: u64 = 1_320_000;
/// Requests of a refresh: one for the labels of services, and one for the devices.
const REQUESTS: usize = 2;

#[derive(Clone, Copy)]
enum Refresh {
    Changed,
    Unchanged,
}

/// Of a whole run with so many devices: a first list, and then these refreshes.
fn instructions(devices: u64, refreshes: &[Refresh]) -> u64 {
    let cloud = Cloud::start(many(devices));
    let (valgrind, library) = tools::valgrind();
    let mut sidecar = Sidecar::of(valgrind, &cloud).env("REFRESH_RATE", "1h");
    if let Some(library) = library {
        sidecar = sidecar.env("VALGRIND_LIB", library.display().to_string());
    }
    let counts = sidecar.path("counts");
    let out = format!("--callgrind-out-file={}", counts.display());
    let sidecar = sidecar.args(["--tool=callgrind", &out, env!("CARGO_BIN_EXE_baletheus")]);
    let running = sidecar.start();
    running.wait_for("updated");
    for (round, refresh) in refreshes.iter().enumerate() {
        match refresh {
            Refresh::Changed => {
                cloud.change(|devices| {
                    for device in devices.iter_mut().skip(50).step_by(100) {
                        device["device_name"] = json!(format!("renamed {round}"));
                    }
                });
                running.signal("HUP");
                running.wait_for_lines("updated", round + 2);
            }
            Refresh::Unchanged => {
                let asked = cloud.requests().len();
                running.signal("HUP");
                cloud.wait_for_requests(asked + REQUESTS, PATIENCE);
            }
        }
    }
    running.signal("TERM");
    let (status, log) = running.wait();
    assert!(status.success(), "{}", log.join("\n"));
    let counts = fs::read_to_string(&counts).expect("what callgrind counted");
    let summary = counts.lines().find_map(|line| line.strip_prefix("summary: ")).expect("a sum");
    summary.trim().parse().expect("a number")
}

#[test]
fn a_device_keeps_to_its_budget_of_instructions() {
    let [few, many] = [200, 400];
    let cold = [few, many].map(|devices| instructions(devices, &[]));
    let changed = [few, many].map(|devices| instructions(devices, &[Refresh::Changed; 3]));
    let unchanged = instructions(few, &[Refresh::Unchanged; 5]);
    let each = |few_and_many: [u64; 2]| (few_and_many[1] - few_and_many[0]) / (many - few);
    let first = each(cold);
    let next = (each(changed) - first) / 3;
    let request = (unchanged - cold[0]) / (5 * REQUESTS as u64);
    println!("{first} by the first list, {next} by a refresh, {request} by a request");
    let mut over = Vec::new();
    for (what, count, budget) in
        [("the first list", first, COLD), ("a refresh", next, CHANGED), ("a request", request, REQUEST)]
    {
        if count > budget {
            over.push(format!("{what}: {count} instructions, {budget} allowed"));
        }
    }
    assert!(over.is_empty(), "{}", over.join("; "));
}
