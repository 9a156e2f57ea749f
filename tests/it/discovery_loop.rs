//! The loop of discovery by a clock that moves only when the test moves it: when a refresh comes, after success and
//! after failure. `retry_after.rs` has what the API's header means.

use std::time::Duration;

use crate::support::fakes::Did::{Fetched, Observed, Published, Waited};
use crate::support::fakes::Loop;
use crate::support::fakes::Refresh::{self, Fails, NotWritten, Refused, Unchanged, Written};

const MINUTE: Duration = seconds(60);
/// Refreshes that take no time.
const AT_ONCE: Duration = seconds(0);

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn at_once(refreshes: &[Refresh]) -> Loop {
    Loop::new(refreshes.iter().map(|refresh| (AT_ONCE, *refresh)))
}

/// Each wait lies between the one due, and a quarter more.
fn assert_back_off(waits: &[Duration], due: &[u64]) {
    assert_eq!(waits.len(), due.len(), "{waits:?}");
    for (number, (wait, due)) in waits.iter().zip(due).enumerate() {
        let due = seconds(*due);
        assert!((due..=due * 5 / 4).contains(wait), "wait {number} of {waits:?} is not {due:?} or a little more");
    }
}

#[test]
fn a_refresh_is_fetched_published_and_observed_in_this_order() {
    let (did, returned) = Loop::new([(seconds(7), Written), (seconds(2), Fails(Some(MINUTE)))]).run(Some(MINUTE));
    let Some(Waited(last)) = did.last() else { panic!("{did:?}") };
    assert_back_off(&[*last], &[60]);
    let first = [Fetched, Published, Observed(seconds(7), true), Waited(seconds(53))];
    // A list that is not whole is not published.
    let second = [Fetched, Observed(seconds(2), false), Waited(*last)];
    assert_eq!(did, first.into_iter().chain(second).collect::<Vec<_>>());
    assert!(returned, "an end that the clock asks for is no failure");
}

#[test]
fn the_interval_counts_from_start_to_start() {
    let took = [0, 10, 59, 60, 61, 600].map(seconds);
    let refreshes = [Written, Unchanged, Refused, Written, Unchanged, Written];
    let waits = Loop::new(took.into_iter().zip(refreshes)).waits(MINUTE);
    // A refresh that takes longer than the interval is followed by the next one, without the ones that were missed.
    assert_eq!(waits, [60, 50, 1, 0, 0, 0].map(seconds));
}

#[test]
fn the_back_off_doubles_to_five_minutes() {
    let waits = at_once(&[Fails(None); 12]).waits(MINUTE);
    assert_back_off(&waits, &[5, 10, 20, 40, 80, 160, 300, 300, 300, 300, 300, 300]);
}

#[test]
fn a_short_interval_is_where_the_back_off_begins() {
    let waits = at_once(&[Fails(None); 11]).waits(seconds(1));
    assert_back_off(&waits, &[1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
}

#[test]
fn a_long_interval_is_where_the_back_off_ends() {
    let waits = at_once(&[Fails(None); 10]).waits(seconds(1000));
    assert_back_off(&waits, &[5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
}

#[test]
fn the_back_off_does_not_overflow() {
    let waits = at_once(&[Fails(None); 200]).waits(Duration::from_secs(u64::from(u32::MAX)));
    let most = seconds(u64::from(u32::MAX));
    assert!(waits[100..].iter().all(|wait| (most..=most * 5 / 4).contains(wait)), "{waits:?}");
}

#[test]
fn each_success_ends_the_back_off() {
    for success in [Written, Unchanged, Refused] {
        let waits = at_once(&[Fails(None), Fails(None), Fails(None), success, Fails(None), Fails(None)]).waits(MINUTE);
        assert_eq!(waits[3], MINUTE, "{success:?}");
        assert_back_off(&[&waits[..3], &waits[4..]].concat(), &[5, 10, 20, 5, 10]);
    }
}

#[test]
fn the_back_off_counts_from_the_end_of_a_refresh() {
    let waits = Loop::new([(seconds(300), Fails(None)), (seconds(300), Fails(Some(seconds(90))))]).waits(MINUTE);
    assert_back_off(&waits, &[5, 90]);
}

#[test]
fn a_list_that_cannot_be_written_backs_off_too() {
    let (did, _) = at_once(&[NotWritten]).run(Some(MINUTE));
    let [Fetched, Published, Observed(_, false), Waited(wait)] = did[..] else { panic!("{did:?}") };
    assert_back_off(&[wait], &[5]);
    assert_back_off(&at_once(&[Fails(None), NotWritten, Fails(None)]).waits(MINUTE), &[5, 10, 20]);
}

/// With a fleet of sidecars behind one API, equal waits would bring them all back at the same moment.
#[test]
fn waits_are_spread_over_a_quarter_more() {
    let waits: Vec<_> = (0..400).flat_map(|_| at_once(&[Fails(None)]).waits(MINUTE)).collect();
    for quarter in 0..4 {
        let range = 50_000 + quarter * 3125..50_000 + (quarter + 1) * 3125;
        let count = waits.iter().filter(|wait| range.contains(&(wait.as_micros() / 100))).count();
        // 100 are due. Fewer than 40 come once in 10¹³ runs.
        assert!(count >= 40, "{count} of 400 waits last {range:?} tenths of a ms");
    }
}

#[test]
fn no_wait_is_shorter_than_retry_after_or_than_the_back_off() {
    for (asked, due) in [(1, 5), (4, 5), (90, 90), (3600, 3600)] {
        assert_back_off(&at_once(&[Fails(Some(seconds(asked)))]).waits(MINUTE), &[due]);
    }
    assert_back_off(&at_once(&[Fails(Some(seconds(1))); 4]).waits(MINUTE), &[5, 10, 20, 40]);
}

#[test]
fn a_failure_with_retry_after_is_a_failure_to_the_next_wait() {
    let asked = Fails(Some(seconds(90)));
    let waits = at_once(&[Fails(None), asked, Fails(None), asked, asked, Fails(None)]).waits(MINUTE);
    assert_back_off(&waits, &[5, 90, 20, 90, 90, 160]);
}

#[test]
fn a_wait_that_is_cut_short_refreshes_at_once() {
    // The next interval counts from the early refresh.
    let early = at_once(&[Written, Written, Written]).wake(1, seconds(13));
    assert_eq!(early.waits(MINUTE), [MINUTE; 3]);
    // An early try that fails is one more failure.
    let early = at_once(&[Fails(None), Fails(Some(seconds(3600))), Fails(None)]).wake(1, AT_ONCE).wake(2, seconds(1));
    assert_back_off(&early.waits(MINUTE), &[5, 3600, 20]);
}

#[test]
fn without_an_interval_it_refreshes_once_and_tells_how_that_went() {
    for (refresh, succeeds) in
        [(Written, true), (Unchanged, true), (Refused, false), (Fails(Some(MINUTE)), false), (NotWritten, false)]
    {
        let (did, returned) = at_once(&[refresh]).run(None);
        assert_eq!(returned, succeeds, "{refresh:?}");
        assert!(matches!(did[..], [Fetched, .., Observed(..)]), "{refresh:?}: {did:?}");
    }
}
