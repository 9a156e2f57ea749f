//! The API misbehaves, in one way after another, under the real binary with all of its log. Whatever the fault: the list stays,
//! the log has the reason and not the key, the next try comes when it should, and all is well once the fault ends.
//! `docs/dev/faults.md` has each of them.

mod hostile;
mod key;
mod runner;
mod table;
mod wire;

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use crate::support::binary::sidecar;
use crate::support::cloud::{Cloud, KEY, Reply};
use crate::support::doc;
use crate::support::fleet::{gateway, gateways};
use crate::support::sidecar::PATIENCE;
use runner::{Look, endure, no_secret, uuids};
use table::faults;
use wire::after;

/// Rows at a time: most of each is waiting.
const WORKERS: usize = 16;

#[test]
fn each_fault_is_survived() {
    let (queue, failed) = (Mutex::new(faults().into_iter()), Mutex::new(Vec::new()));
    let next = || queue.lock().unwrap().next();
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(fault) = next() {
                    let (name, start) = (fault.name, Instant::now());
                    match catch_unwind(AssertUnwindSafe(|| endure(fault))) {
                        Ok(memory) => println!("{name}: {:.1?}, {} MiB", start.elapsed(), memory >> 10),
                        Err(panic) => failed.lock().unwrap().push(format!("{name}: {}", said(&*panic))),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} faults were not survived:\n\n{}", failed.len(), failed.join("\n\n"));
}

fn said(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref().copied()).unwrap_or("?")
}

#[test]
fn the_document_has_each_row_and_no_other() {
    let known: BTreeSet<_> = faults().iter().map(|fault| fault.name.to_owned()).collect();
    assert_eq!(known.len(), faults().len(), "two rows have one name");
    let shown = doc::rows().into_iter().flat_map(|row| row.tests);
    let shown = shown.filter(|shown| (&*shown.file, &*shown.test) == ("faults.rs", "each_fault_is_survived"));
    let told: BTreeSet<_> = shown.map(|shown| shown.row.expect("a row")).collect();
    assert_eq!(known, told, "on the left the rows of the test, on the right those of docs/dev/faults.md");
}

#[test]
fn a_name_that_does_not_resolve_is_tried_again() {
    let cloud = Cloud::start(gateways(5));
    let sidecar = sidecar(&cloud).env("RUST_LOG", "trace");
    sidecar.oneshot();
    let before = Look::at(&sidecar);
    let sidecar = sidecar.env("BALENA_API_URL", "https://api.baletheus.invalid");
    let running = sidecar.start();
    let line = running.wait_for_lines("refresh failed: ", 2);
    assert!(line.contains("cannot reach https://api.baletheus.invalid: ") && line.contains("next try in "), "{line}");
    assert!(Look::at(&sidecar) == before, "the file was touched");
    no_secret("DNS", &sidecar, &running, KEY);
    drop(running);
    cloud.change(|fleet| fleet.push(gateway(6)));
    sidecar.env("BALENA_API_URL", cloud.url()).oneshot();
}

#[test]
fn the_wait_doubles_up_to_five_minutes_and_begins_anew() {
    let cloud = Cloud::start(gateways(5));
    let sidecar = sidecar(&cloud);
    let fail = || cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let wait = |line: &str| humantime::parse_duration(line.rsplit_once("next try in ").unwrap().1).unwrap().as_secs();
    fail();
    let running = sidecar.start();
    for failure in 0..12 {
        let line = running.wait_for_lines("refresh failed: ", failure + 1);
        let most: u64 = 300.min(1 << failure);
        assert!((most..=most * 5 / 4).contains(&wait(&line)), "failure {failure}: {line}");
        running.signal("HUP");
    }
    running.wait_for_lines("refresh failed: ", 13);
    cloud.heal();
    running.signal("HUP");
    running.wait_for("updated balena.json: 5 targets");
    fail();
    let line = running.wait_for_lines("refresh failed: ", 14);
    assert!(wait(&line) <= 1, "{line}");
}

/// A server that always asks for a second would be asked every second.
#[test]
fn a_short_retry_after_does_not_shorten_the_wait() {
    let cloud = Cloud::start(gateways(1));
    cloud.intercept(|_, _| Some(Reply::status(429, &[("Retry-After", "1")], b"")));
    let running = sidecar(&cloud).env("REFRESH_RATE", "30s").start();
    for (failure, shortest) in (1..).zip([5, 10, 20, 40]) {
        let line = running.wait_for_lines("refresh failed: ", failure);
        let wait = humantime::parse_duration(line.rsplit_once("next try in ").unwrap().1).unwrap().as_secs();
        assert!((shortest..=shortest * 5 / 4).contains(&wait), "{line}");
        running.signal("HUP");
    }
}

#[test]
fn devices_that_change_between_two_pages_are_neither_lost_nor_doubled() {
    let cloud = Cloud::start(gateways(2500));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2500 targets");
    let (asks, asked) = channel();
    let (go, goes) = channel();
    cloud.intercept(move |seen, _| {
        if after(seen) == 1000 && asks.send(()).is_ok() {
            let _ = goes.recv(); // the first time; later nobody waits any more
        }
        None
    });
    asked.recv_timeout(PATIENCE).expect("the second page is asked for");
    drop(asked);
    // The first page is told, the second is on its way, the third is not asked for yet.
    cloud.change(|fleet| {
        fleet.retain(|device| device["id"] != 5 && device["id"] != 1500);
        fleet.iter_mut().find(|device| device["id"] == 2400).unwrap()["device_name"] = "renamed".into();
        fleet.push(gateway(2501));
    });
    go.send(()).expect("the cloud waits");
    drop(go);
    // What went is there until the next refresh, and nothing is there twice.
    running.wait_for("updated balena.json: 2501 targets on 2501 devices (devices: +1 -0 ~1)");
    running.wait_for("updated balena.json: 2499 targets on 2499 devices (devices: +0 -2 ~0)");
    let wanted: Vec<_> = (1..=2501).filter(|id| ![5, 1500].contains(id)).map(|id| format!("{id:032x}")).collect();
    assert_eq!(uuids(&sidecar.list()), wanted);
    assert!(sidecar.list().contains("\"renamed\""));
}
