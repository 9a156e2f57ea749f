//! Refresh after refresh against an API with random faults, and a disk with some: memory, file descriptors and threads at
//! the end are what they were at the beginning.
//!
//! By default it makes 300 refreshes; for more, with figures: `REFRESHES=100000 cargo test --release --test soak -- --nocapture`.

pub mod support {
    pub mod binary;
    pub mod cloud;
    pub mod fleet;
    pub mod moments;
    pub mod odata;
    pub mod recording;
    pub mod rules;
    pub mod sidecar;
}

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{env, fs};

use flate2::Compression;
use serde_json::json;
use support::binary::sidecar;
use support::cloud::{Cloud, Reply, Step, gzip};
use support::fleet::{demo_fleet, many};
use support::moments::unfinished;
use support::sidecar::{self, PATIENCE, finish};

/// One of many ways to answer, or the answer that is due, by a random number below 10,000.
fn answer(draw: u64, due: &[u8], bomb: &[u8]) -> Option<Reply> {
    let status = |status, headers: &[(&str, &str)], body: &[u8]| Some(Reply::status(status, headers, body));
    let steps = |steps: &[Step]| Some(Reply::steps(steps.to_vec()));
    let send = |bytes: &[u8]| Step::Send(bytes.to_vec());
    match draw {
        0..5 => steps(&[Step::Hang]),
        5..10 => steps(&[send(&due[..due.len() / 2]), Step::Hang]),
        10..20 => status(200, &[("Content-Encoding", "gzip")], bomb),
        20..100 => steps(&[Step::Pause(Duration::from_millis(20)), send(due)]),
        100..5500 => match draw % 18 {
            0 => status(400, &[], b"\"Malformed url\""),
            1 => status(401, &[("ETag", "W/\"401\"")], b""),
            2 => status(403, &[], b""),
            3 => status(404, &[], b""),
            4 => status(429, &[("Retry-After", "60")], b"\"Too Many Requests\""),
            5 => status(500, &[("ETag", "W/\"500\"")], b"Internal Server Error"),
            6 => status(502, &[("Content-Type", "text/html")], b"<html><h1>Bad Gateway</h1></html>"),
            7 => status(503, &[("Retry-After", "Fri, 31 Dec 9999 23:59:59 GMT")], b""),
            8 => status(301, &[("Location", "https://elsewhere.example/v7/device")], b""),
            9 => steps(&[Step::Close]),
            10 => steps(&[Step::Reset]),
            11 => steps(&[send(&due[..due.len() - 1]), Step::Close]),
            12 => steps(&[send(&due[..due.len() / 2]), Step::Reset]),
            13 => status(200, &[], b"{\"d\":[{\"id\":1,\"device_name\":\"\xff\"}]}"),
            14 => status(200, &[], b"{\"d\":[{\"id\":1,"),
            15 => status(200, &[], b"{\"d\":{}}"),
            16 => status(200, &[], br#"{"d":[{"id":7},{"id":5}]}"#),
            _ => steps(&[send(b"SSH-2.0-OpenSSH_9.2\r\n")]),
        },
        _ => None,
    }
}

/// KiB of memory, threads, and open files.
fn sample(id: u32) -> [usize; 3] {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("it lives");
    let field = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of the status");
        line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    };
    let files = fs::read_dir(format!("/proc/{id}/fd")).expect("it lives").count();
    [field("VmRSS:"), field("Threads:"), files]
}

fn medians(samples: &[[usize; 3]]) -> [usize; 3] {
    [0, 1, 2].map(|what| {
        let mut values: Vec<_> = samples.iter().map(|sample| sample[what]).collect();
        values.sort_unstable();
        values[values.len() / 2]
    })
}

#[test]
fn memory_files_and_threads_stay_as_they_are() {
    let refreshes: usize = env::var("REFRESHES").map_or(300, |count| count.parse().expect("REFRESHES is a number"));
    let cloud = Cloud::start([demo_fleet(), many(40)].concat().into_iter().collect());
    cloud.change(|devices| devices.sort_by_key(|device| device["id"].as_u64()));
    let sidecar = sidecar(&cloud).env("API_TIMEOUT", "1s");
    let bomb = gzip(&vec![b' '; (64 << 20) + 1], Compression::fast());

    let (came, comes) = mpsc::channel();
    let driven = Arc::new(AtomicU32::new(0));
    let drives = driven.clone();
    cloud.intercept(move |seen, due| {
        if !seen.target.starts_with("/v7/device?") || !seen.target.contains("(id%20gt%200)") {
            return None;
        }
        // The next refresh follows this one at once, be that a failure.
        let id = drives.load(SeqCst);
        if id != 0 {
            let _ = sidecar::send(id, "HUP");
            let _ = came.send(());
        }
        answer(fastrand::u64(0..10_000), due, &bomb)
    });
    let running = sidecar.start();
    driven.store(running.id(), SeqCst);
    let (start, file) = (Instant::now(), sidecar.path("balena.json"));
    let (mut samples, mut spoiled) = (Vec::new(), 0);
    for count in 0..refreshes {
        let next = comes.recv_timeout(PATIENCE);
        assert!(next.is_ok(), "nothing comes after {count} refreshes:\n{}", running.log().join("\n"));
        if count % 1000 == 0 {
            cloud.clear_requests();
        }
        if count % (refreshes / 1000).max(1) == 0 {
            samples.push(sample(running.id()));
        }
        // The fleet changes; and now and then somebody has a hand in the file.
        if fastrand::u8(..) < 80 {
            let name = format!("renamed {}", fastrand::u8(..));
            cloud.change(|devices| devices[fastrand::usize(0..65)]["device_name"] = json!(name));
        }
        if fastrand::u8(..) < 8 {
            spoiled += 1;
            let _ = match fastrand::u8(0..4) {
                0 => fs::write(&file, "[\n"),
                1 => fs::remove_file(&file).and_then(|()| fs::create_dir(&file)),
                2 => fs::remove_dir_all(sidecar.path(".balena.json.tmp")),
                _ => fs::remove_file(&file),
            };
        } else {
            let _ = fs::remove_dir(&file);
        }
    }
    let took = start.elapsed();
    cloud.heal();
    let _ = fs::remove_dir(&file);
    // What is on its way yet is a refresh that may have failed; after one more all is well.
    cloud.change(|devices| devices[0]["device_name"] = json!("the last"));
    running.signal("HUP");
    running.wait_for("changed the last (");
    let mut dry = sidecar.command();
    dry.arg("--dry-run");
    assert_eq!(fs::read(&file).unwrap(), finish(dry).stdout);
    assert_eq!(unfinished(&sidecar.path(".balena.json.tmp")), [""; 0]);

    let log = running.log();
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for line in log.iter().filter_map(|line| line.split_once("refresh failed: ")) {
        let reason = line.1.replace(&cloud.url(), "the API");
        let known = [
            "answers 4",
            "answers 5",
            "answers 301",
            "broke off",
            "no page of devices",
            "no whole answer",
            "cannot write",
        ];
        let known = known.into_iter().find(|known| reason.contains(known)).unwrap_or("other");
        *reasons.entry(known).or_default() += 1;
    }
    let written = log.iter().filter(|line| line.contains("updated balena.json")).count();
    // Not the very first ones, while caches and buffers fill.
    let tenth = samples.len() / 10;
    let [early, late] = [&samples[tenth..2 * tenth], &samples[samples.len() - tenth..]].map(medians);
    println!(
        "{refreshes} refreshes in {took:.0?}: {written} lists written, file spoiled {spoiled} times, failures {reasons:?}"
    );
    println!("KiB of memory, threads, open files: first {:?}, second tenth {early:?}, last tenth {late:?}", samples[0]);
    let [memory, threads, files] = [0, 1, 2].map(|what| samples.iter().map(|sample| sample[what]).max().unwrap());
    let by_tenths: Vec<_> = samples.chunks(tenth).map(|samples| medians(samples)[0]).collect();
    println!("highest: {memory}, {threads}, {files}; memory by tenths: {by_tenths:?}");
    assert!(
        reasons.values().sum::<usize>() > refreshes / 4 && reasons.len() > 3,
        "few faults are no proof: {reasons:?}"
    );
    assert!(written > refreshes / 20, "{written} lists are no proof");
    // The allocator keeps what the largest answers took, so memory moves by some; a leak of 64 bytes a refresh would
    // make 6 MiB in the long run.
    assert!(late[0] <= early[0] + early[0] / 10 + 2048, "memory: {early:?} KiB became {late:?}");
    assert_eq!((late[1], late[2]), (early[1], early[2]), "threads and open files");
}
