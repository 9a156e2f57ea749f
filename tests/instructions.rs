//! What a device costs, in instructions: unlike a time, their number does not depend on what else the machine does.
//!
//! The counts are valgrind's, of the debug binary, which is there anyway; they are some ten times those of a release. What
//! does not depend on the number of devices is subtracted. From run to run they differ by less than one in a thousand, but
//! by more from compiler to compiler and from processor to processor: so a budget was set to half as much again as was measured on
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
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::cloud::Cloud;
use support::fleet::many;
use support::sidecar::{PATIENCE, Running, Sidecar};
use support::tools;

/// Instructions that a device may cost from a start to the first file.
const COLD: u64 = 900_000;
/// Instructions that a device may cost by a refresh at which one in a hundred has changed.
const CHANGED: u64 = 250_000;
/// Instructions that a device may cost from a start to the first file, with its state and what its supervisor reports, as shipped.
const SHIPPED_COLD: u64 = 1_330_000;
/// Instructions that a device may cost by a refresh at which one in a hundred has changed and a scrape with gzip, as shipped.
const SHIPPED_CHANGED: u64 = 1_490_000;
/// Instructions that a request may cost that is answered by 304.
const REQUEST: u64 = 1_340_000;
/// Requests of a refresh: one for the labels of services, and one for the devices.
const REQUESTS: usize = 2;

#[derive(Clone, Copy)]
enum Refresh {
    Changed,
    Unchanged,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Configuration {
    Discovery,
    /// With the status endpoint and the metrics of devices, and with a scrape after each refresh.
    Shipped,
}

/// Holds up each refresh at its first request until the test opens. SIGHUP is no alternative: callgrind fails when other threads run
/// while one handles a signal.
#[derive(Default)]
struct Gate {
    /// How many refreshes have come, and how many may pass.
    counts: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut counts = self.counts.lock().expect("no panic");
        counts.0 += 1;
        let number = counts.0;
        self.changed.notify_all();
        let _passes = self.changed.wait_while(counts, |counts| counts.1 < number).expect("no panic");
    }

    fn open(&self, refreshes: usize) {
        self.counts.lock().expect("no panic").1 = refreshes;
        self.changed.notify_all();
    }

    /// Waits until this refresh waits: those before it are done.
    fn wait_for(&self, refresh: usize) {
        let counts = self.counts.lock().expect("no panic");
        let waited = self.changed.wait_timeout_while(counts, PATIENCE, |counts| counts.0 < refresh);
        assert!(!waited.expect("no panic").1.timed_out(), "refresh {refresh} does not come");
    }
}

/// Of a whole run with so many devices: a first list, and then these refreshes.
fn instructions(configuration: Configuration, devices: u64, refreshes: &[Refresh]) -> u64 {
    let cloud = Cloud::start(many(devices));
    let gate = Arc::new(Gate::default());
    cloud.intercept({
        let gate = gate.clone();
        move |seen, _| {
            // Not the small question that follows a new page.
            if seen.target.starts_with("/v7/release?") && seen.target.contains("release_image") {
                gate.pass();
            }
            None
        }
    });
    gate.open(1);
    let (valgrind, library) = tools::valgrind();
    let mut sidecar = Sidecar::of(valgrind, &cloud).env("REFRESH_RATE", "1s");
    if let Some(library) = library {
        sidecar = sidecar.env("VALGRIND_LIB", library.display().to_string());
    }
    let counts = sidecar.path("counts");
    let out = format!("--callgrind-out-file={}", counts.display());
    let sidecar = sidecar.args(["--tool=callgrind", &out, env!("CARGO_BIN_EXE_baletheus")]);
    let shipped = [("LISTEN_ADDRESS", "127.0.0.1:0"), ("DEVICE_METRICS", "true"), ("DEVICE_REFRESH_RATE", "1h")];
    let has_status = configuration == Configuration::Shipped;
    let sidecar = shipped.into_iter().filter(|_| has_status).fold(sidecar, |it, (name, value)| it.env(name, value));
    let running = sidecar.start();
    running.wait_for("updated");
    if has_status {
        let mut requests = cloud.requests();
        while !requests.iter().any(|seen| seen.target.contains("memory_usage")) {
            requests = cloud.wait_for_requests(requests.len() + 1, PATIENCE);
        }
    }
    for (round, refresh) in refreshes.iter().enumerate() {
        gate.wait_for(round + 2);
        if let Refresh::Changed = refresh {
            cloud.change(|devices| {
                for device in devices.iter_mut().skip(50).step_by(100) {
                    device["device_name"] = json!(format!("renamed {round}"));
                }
            });
        }
        gate.open(round + 2);
        if let Refresh::Changed = refresh {
            running.wait_for_lines("updated", round + 2);
            if has_status {
                scrape(&running, devices);
            }
        }
    }
    gate.wait_for(refreshes.len() + 2);
    settle(&running);
    running.signal("TERM");
    let (status, log) = running.wait();
    gate.open(usize::MAX);
    assert!(status.success(), "{}", log.join("\n"));
    let counts = fs::read_to_string(&counts).expect("what callgrind counted");
    let summary = counts.lines().find_map(|line| line.strip_prefix("summary: ")).expect("a sum");
    summary.trim().parse().expect("a number")
}

/// Waits until all of its threads wait, for other things than each other.
fn settle(running: &Running) {
    let deadline = Instant::now() + PATIENCE;
    let (mut calm, mut last) = (0, String::new());
    while calm < 5 {
        assert!(Instant::now() < deadline, "it does not come to rest");
        thread::sleep(Duration::from_millis(100));
        let tasks = fs::read_dir(format!("/proc/{}/task", running.id())).expect("it runs");
        let stats = tasks.flatten().map(|task| fs::read_to_string(task.path().join("stat")).unwrap_or_default());
        let stats: Vec<_> = stats.map(|stat| stat.rsplit(')').next().unwrap_or_default().to_owned()).collect();
        let (waits, now) = (stats.iter().all(|stat| stat.starts_with(" S ")), stats.concat());
        calm = if waits && now == last { calm + 1 } else { 0 };
        last = now;
    }
}

/// As Prometheus does.
fn scrape(running: &Running, devices: u64) {
    let line = running.wait_for("status on http://");
    let (_, address) = line.rsplit_once("http://").expect("a URL");
    let mut stream = TcpStream::connect(address).expect("it listens");
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\nAccept-Encoding: gzip\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a head") + 4;
    let mut text = String::new();
    flate2::read::GzDecoder::new(&answer[body..]).read_to_string(&mut text).expect("gzip");
    for metric in ["balena_device_memory_used_bytes{", "balena_device_services_running{"] {
        assert_eq!(text.lines().filter(|line| line.starts_with(metric)).count() as u64, devices, "{metric} {text}");
    }
}

const FEW: u64 = 100;
const MANY: u64 = 200;

/// Of a whole run with few devices, and what a device costs by the first list and by a changed refresh.
fn count(configuration: Configuration) -> (u64, u64, u64) {
    let each = |few_and_many: [u64; 2]| (few_and_many[1] - few_and_many[0]) / (MANY - FEW);
    let cold = [FEW, MANY].map(|devices| instructions(configuration, devices, &[]));
    let changed = [FEW, MANY].map(|devices| instructions(configuration, devices, &[Refresh::Changed; 3]));
    let first = each(cold);
    (cold[0], first, (each(changed) - first) / 3)
}

/// Compares counts with their budgets.
fn check(counts: &[(&str, u64, u64)]) {
    let mut over = Vec::new();
    for (what, count, budget) in counts {
        println!("{what}: {count} instructions");
        if count > budget {
            over.push(format!("{what}: {count} instructions, {budget} allowed"));
        }
    }
    assert!(over.is_empty(), "{}", over.join("; "));
}

#[test]
fn discovery_keeps_to_its_budget_of_instructions() {
    let (cold, first, next) = count(Configuration::Discovery);
    let unchanged = instructions(Configuration::Discovery, FEW, &[Refresh::Unchanged; 5]);
    let request = (unchanged - cold) / (5 * REQUESTS as u64);
    check(&[("the first list", first, COLD), ("a refresh", next, CHANGED), ("a request", request, REQUEST)]);
}

#[test]
fn what_is_shipped_keeps_to_its_budget_of_instructions() {
    let (_, first, next) = count(Configuration::Shipped);
    check(&[
        ("the first list, as shipped", first, SHIPPED_COLD),
        ("a refresh and a scrape, as shipped", next, SHIPPED_CHANGED),
    ]);
}
