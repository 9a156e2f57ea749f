//! `kill -9` at any moment, while the list changes all the time: a reader of the file always sees a whole list.
//!
//! By default it kills 25 times; for more: `KILLS=500 cargo test --release --test kill`.

pub mod support {
    pub mod binary;
    pub mod cloud;
    pub mod moments;
    pub mod odata;
    pub mod recording;
    pub mod rules;
    pub mod sidecar;
}

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{env, fs, hint, thread};

use support::binary::sidecar;
use support::cloud::Cloud;
use support::moments::{Moments, moment, unfinished};
use support::sidecar::PATIENCE;

/// Ends the reader, after a panic too.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn a_reader_sees_a_whole_list_at_every_moment() {
    let kills: usize = env::var("KILLS").map_or(25, |kills| kills.parse().expect("KILLS is a number"));
    let cloud = Cloud::start(Vec::new());
    let moments = Moments::of(&cloud, 1200);
    let sidecar = sidecar(&cloud);
    let start = Instant::now();
    sidecar.oneshot();
    let span = start.elapsed(); // of a start and a refresh
    let (file, scratch) = (sidecar.path("balena.json"), sidecar.path(".balena.json.tmp"));
    let over = AtomicBool::new(false);
    let (mut left, mut starts_after_one) = (0, 0);

    // By Prometheus' rules for a target file, whenever it is not byte for byte the list that was read before.
    let read = || {
        let (mut reads, mut seen, mut last, mut known) = (0, 0, 0, Vec::new());
        while !over.load(SeqCst) {
            let list = fs::read(&file).map_err(|error| format!("after {reads} reads: {error}"))?;
            reads += 1;
            if list == known {
                continue;
            }
            let now = moment(&list).map_err(|why| format!("after {reads} reads: {why}"))?;
            if now <= last {
                return Err(format!("moment {now} after {last}"));
            }
            (seen, last, known) = (seen + 1, now, list);
        }
        Ok::<_, String>((reads, seen))
    };
    thread::scope(|scope| {
        let reader = scope.spawn(read);
        let end = Over(&over);
        for kill in 0..kills {
            let before = unfinished(&scratch);
            cloud.clear_requests();
            let mut running = sidecar.start();
            moments.drive(Some(&running));
            if kill % 2 == 0 {
                thread::sleep(span.mul_f64(4.0 * fastrand::f64()));
            } else {
                // In one of its first writes, or just after.
                let (mut writes, mut known, deadline) = (fastrand::u8(1..4), before.clone(), Instant::now() + PATIENCE);
                // A SIGHUP for its predecessor's last request may end it before it listens for one.
                while writes > 0 && !running.has_ended() {
                    assert!(Instant::now() < deadline, "it writes nothing:\n{}", running.log().join("\n"));
                    let now = unfinished(&scratch);
                    writes -= u8::from(now.iter().any(|name| !known.contains(name)));
                    known.extend(now);
                }
                let moment = Instant::now() + Duration::from_micros(fastrand::u64(0..3000));
                while Instant::now() < moment {
                    hint::spin_loop();
                }
            }
            let came = !cloud.requests().is_empty();
            drop(running); // with SIGKILL
            let now = unfinished(&scratch);
            left += usize::from(!now.is_empty());
            assert!(now.len() <= 1 || !came, "more than one write was under way: {now:?}");
            if came && !before.is_empty() {
                assert!(!now.contains(&before[0]), "the start did not clean up: {now:?}");
                starts_after_one += 1;
            }
            if reader.is_finished() {
                break;
            }
        }
        drop(end);
        moments.drive(None);
        let (reads, seen) = reader.join().unwrap().unwrap_or_else(|why| panic!("a reader saw {why}"));
        println!("{kills} kills, {left} of them within a write; {reads} reads of {seen} lists");
        assert!(reads > kills && seen > kills / 4, "{reads} reads of {seen} lists are no proof");
        assert!(left > kills / 25 && starts_after_one > 0, "{left} kills within a write are no proof");
    });
    sidecar.oneshot();
    assert_eq!(unfinished(&scratch), [""; 0]);
    moment(&fs::read(&file).unwrap()).unwrap();
}
