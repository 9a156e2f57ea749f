//! Runs one fault: all is well, the fault, and all is well again.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::support::binary::sidecar;
use crate::support::cloud::{Cloud, KEY};
use crate::support::fleet::{gateway, gateways};
use crate::support::sidecar::{PATIENCE, Running, Sidecar};
use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::Value;

use super::table::Next::{After, BacksOff, Hour, Once};
use super::table::Then::{Fails, Lists, Quiet};
use super::table::{ETAG_OF_NOTHING, Fault, Inject};
use super::wire::{CERTIFICATES, Speech, speaking};

/// The one test of each fault; tells how much memory the sidecar took, in KiB.
pub fn endure(fault: Fault) -> u64 {
    let Fault { name, inject, then, also, devices, memory: most_memory, env, https, before } = fault;
    // All is well.
    let speech = Arc::new(Mutex::new(if https { Speech::Tls(CERTIFICATES.good.clone()) } else { Speech::Plain }));
    let healthy_speech = speech.lock().unwrap().clone();
    let mut cloud = speaking((Ipv4Addr::LOCALHOST, 0).into(), gateways(devices), &speech);
    let addr = cloud.addr();
    if let Some(before) = before {
        cloud.intercept(before);
    }
    let url = format!("http{}://{addr}", if https { "s" } else { "" });
    let env = env.into_iter().fold(sidecar(&cloud), |sidecar, (name, value)| sidecar.env(name, value));
    // The faults are of the requests for devices. `tests/it/services.rs` has those of the requests for labels.
    let sidecar = env.env("BALENA_API_URL", &url).env("RUST_LOG", "trace").env("SERVICE_LABELS", "false");
    fs::write(sidecar.path("ca.pem"), &CERTIFICATES.ca).unwrap();
    let running = sidecar.start();
    running.wait_for(&format!("updated balena.json: {devices} targets on {devices} devices"));
    let before = Look::at(&sidecar);
    assert!(before.list == list_of(devices), "{name}");

    // It is not, and the fleet goes on meanwhile.
    match inject {
        Inject::Answers(answer) => cloud.intercept(answer),
        Inject::Speaks(other) => *speech.lock().unwrap() = other,
        Inject::Nobody => drop(std::mem::replace(&mut cloud, Cloud::start(Vec::new()))),
    }
    let from = cloud.requests().len();
    let goes_on = || cloud.change(|fleet| fleet.push(gateway(devices + 1)));
    match &then {
        Fails(said, next) => {
            // Before that, a refresh may be half way through.
            running.wait_for("refresh failed: ");
            goes_on();
            let tries = if matches!(next, Hour | Once) { 1 } else { 2 };
            let line = running.wait_for_lines("refresh failed: ", tries);
            let failed: Vec<_> = running.log().into_iter().filter(|line| line.contains("refresh failed: ")).collect();
            for said in
                [&["WARN  refresh failed: ", &url, also, "; balena.json stays as it is, next try in "], *said].concat()
            {
                assert!(line.contains(said), "{name}: not {said:?} in\n{line}");
            }
            assert!(line.len() < 2000, "{name}: {line}");
            let (shown, least) = match next {
                BacksOff | Once => (&["0s", "1s"][..], 500),
                After(seconds) => (&[["0s", "1s", "2s", "3s"][usize::try_from(*seconds).unwrap()]][..], seconds * 1000),
                Hour => (&["1h"][..], 0),
            };
            let (_, wait) = failed[0].rsplit_once("next try in ").unwrap();
            assert!(shown.contains(&wait), "{name}: {}", failed[0]);
            if let [first, second, ..] = &*failed {
                let apart = time_of(second).duration_since(time_of(first)).unwrap();
                // the log has whole milliseconds
                assert!(apart >= Duration::from_millis(least - 1), "{name}: {apart:?} between\n{first}\n{second}");
            }
            assert!(Look::at(&sidecar) == before, "{name}: the file was touched");
        }
        Lists(ids, said) => {
            goes_on();
            running.wait_for(said);
            let wanted: Vec<_> = ids.iter().map(|id| format!("{id:032x}")).collect();
            wait_until(&running, || uuids(&sidecar.list()) == wanted);
            assert!(running.log().iter().all(|line| !line.contains("refresh failed")), "{name}");
        }
        Quiet => {
            goes_on();
            cloud.wait_for_requests(from + 3, PATIENCE);
            assert!(Look::at(&sidecar) == before, "{name}: the file was touched");
            assert!(running.log().iter().all(|line| !line.contains("refresh failed")), "{name}");
        }
    }

    // All is well again.
    *speech.lock().unwrap() = healthy_speech;
    let seen = cloud.requests();
    if cloud.addr() == addr {
        cloud.heal();
    } else {
        cloud = speaking(addr, gateways(devices + 1), &speech);
    }
    running.signal("HUP");
    let wanted = list_of(devices + 1);
    wait_until(&running, || sidecar.list() == wanted);

    // Nothing stays behind.
    for seen in seen.iter().chain(&cloud.requests()) {
        let etag = seen.header("if-none-match");
        assert_ne!(etag, Some(ETAG_OF_NOTHING), "{name}: an ETag of an answer that was no list is used");
        assert!(etag.is_none_or(|etag| !etag.contains(KEY)), "{name}");
    }
    let scratch = fs::read_dir(sidecar.path(".balena.json.tmp")).unwrap().map(|file| file.unwrap().file_name());
    assert_eq!(scratch.collect::<Vec<_>>(), ["lock"], "{name}");
    let memory = peak_memory(&running);
    assert!(memory < most_memory, "{name}: it took {memory} KiB");
    no_secret(name, &sidecar, &running, KEY);
    running.signal("TERM");
    let (status, log) = running.wait();
    assert!(status.success(), "{name}: {status}");
    assert!(log.iter().any(|line| line.contains("reqwest") || line.contains("hyper")), "libraries are not heard");
    log.iter().for_each(|line| one_record(line));
    memory
}

/// What people and Prometheus can tell of the file.
#[derive(PartialEq)]
pub struct Look {
    pub list: String,
    pub inode: u64,
    pub changed: (i64, i64),
}

impl Look {
    pub fn at(sidecar: &Sidecar) -> Self {
        let file = fs::metadata(sidecar.path("balena.json")).unwrap();
        Look { list: sidecar.list(), inode: file.ino(), changed: (file.mtime(), file.mtime_nsec()) }
    }
}

/// Looks again and again, until it is so.
fn wait_until(running: &Running, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        let own = |line: &String| [" WARN  ", " INFO  "].iter().any(|level| line.contains(level));
        let log = || running.log().into_iter().filter(own).collect::<Vec<_>>().join("\n");
        assert!(Instant::now() < deadline, "it does not come to that:\n{}", log());
        thread::sleep(Duration::from_millis(10));
    }
}

/// The list of a healthy fleet of so many.
fn list_of(devices: u64) -> String {
    static LISTS: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());
    let mut lists = LISTS.lock().unwrap_or_else(|broken| broken.into_inner());
    let make = || {
        let cloud = Cloud::start(gateways(devices));
        let sidecar = sidecar(&cloud);
        sidecar.oneshot();
        sidecar.list()
    };
    lists.entry(devices).or_insert_with(make).clone()
}

pub fn uuids(list: &str) -> Vec<String> {
    let list: Vec<Value> = serde_json::from_str(list).expect("a list");
    list.iter().map(|group| group["labels"]["uuid"].as_str().unwrap().to_owned()).collect()
}

/// The most memory that it ever had, in KiB.
fn peak_memory(running: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

/// The time at the beginning of a line of the log.
pub fn time_of(line: &str) -> SystemTime {
    humantime::parse_rfc3339(line.split(' ').next().unwrap()).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// No part of a key is told, in any of the ways in which a library shows bytes.
pub fn no_secret(name: &str, sidecar: &Sidecar, running: &Running, key: &str) {
    let mut places = vec![("the log".to_owned(), running.log().join("\n"))];
    let command_line = fs::read(format!("/proc/{}/cmdline", running.id())).unwrap();
    places.push(("the command line".into(), String::from_utf8_lossy(&command_line).into_owned()));
    walk(sidecar.dir.path(), &mut |path| {
        places.push((path.display().to_string(), String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()));
    });
    let parts = key.as_bytes().windows(12);
    for part in parts.step_by(4).chain([&key.as_bytes()[key.len() - 12..]]) {
        let decimal = format!("{part:?}");
        let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
        for shown in [str::from_utf8(part).unwrap(), decimal.trim_matches(['[', ']']), &hex] {
            for (place, text) in &places {
                let at = text.find(shown);
                let around =
                    |at: usize| String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(200)..at]).into_owned();
                assert!(at.is_none(), "{name}: {place} has the key, after …{}", around(at.unwrap()));
            }
        }
    }
    let whole = BASE64_STANDARD.encode(key);
    assert!(places.iter().all(|(_, text)| !text.contains(&whole)), "{name}");
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => walk(&entry.path(), visit),
            kind if kind.is_file() => visit(&entry.path()),
            _ => {}
        }
    }
}

/// A line of the log, as text, is a record: it begins with time and level, and nothing in it moves cursor or direction.
pub fn one_record(line: &str) {
    assert!(!line.starts_with("1999"), "forged: {line:?}");
    let _ = time_of(line);
    let level = line.split(' ').nth(1).unwrap();
    assert!(["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level), "{line:?}");
    let bad = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!line.contains(bad), "{line:?}");
}
