//! What the API's `Retry-After` means, as the client reads it from an answer. `discovery_loop.rs` has what comes of it.

use std::time::{Duration, SystemTime};

use crate::support::cloud::{Cloud, Reply};
use crate::support::fakes;

const NOW: &str = "Sun, 22 Nov 2026 06:59:37 GMT";

/// Reads it from answers with these headers.
fn reader() -> impl FnMut(u16, &[(&str, &str)]) -> Option<Duration> {
    let cloud = Cloud::start(Vec::new());
    let api = fakes::api(&cloud.url());
    move |status, headers| {
        let headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        cloud.intercept(move |_, _| {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (&**name, &**value)).collect();
            Some(Reply::status(status, &headers, b""))
        });
        fakes::retry_after(&api)
    }
}

#[test]
fn seconds_are_followed_up_to_an_hour() {
    let mut read = reader();
    for (text, seconds) in [
        ("1", Some(1)),
        ("120", Some(120)),
        ("007", Some(7)),
        ("3600", Some(3600)),
        ("3601", Some(3600)),
        ("99999999999999999999999999", Some(3600)),
        // No wait at all would be a loop without a pause.
        ("0", None),
        ("-5", None),
        ("+5", None),
        ("1.5", None),
        ("5 s", None),
        ("soon", None),
        ("", None),
    ] {
        assert_eq!(read(429, &[("Retry-After", text)]), seconds.map(Duration::from_secs), "Retry-After: {text}");
    }
}

#[test]
fn a_date_counts_from_the_date_of_the_answer() {
    let mut read = reader();
    for (text, seconds) in [
        ("Sun, 22 Nov 2026 06:59:38 GMT", Some(1)),
        ("Sun, 22 Nov 2026 07:59:37 GMT", Some(3600)),
        ("Sun, 22 Nov 2026 07:59:38 GMT", Some(3600)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", Some(3600)),
        // the two older forms of RFC 9110
        ("Sunday, 22-Nov-26 06:59:47 GMT", Some(10)),
        ("Sun Nov 22 06:59:47 2026", Some(10)),
        (NOW, None),
        ("Sun, 22 Nov 2026 06:59:36 GMT", None),
        ("2026-11-22T07:00:00Z", None),
    ] {
        let seconds = seconds.map(Duration::from_secs);
        assert_eq!(read(503, &[("Date", NOW), ("Retry-After", text)]), seconds, "Retry-After: {text}");
    }
}

#[test]
fn a_date_counts_from_the_own_clock_where_the_answer_has_none() {
    let mut read = reader();
    let at = |time: SystemTime| httpdate::fmt_http_date(time);
    for date in [&[][..], &[("Date", "yesterday")]] {
        let later = at(SystemTime::now() + Duration::from_secs(600));
        let wait = read(429, &[date, &[("Retry-After", &later)]].concat()).expect("a wait");
        // A date has whole seconds, and an answer takes time.
        assert!((Duration::from_secs(500)..=Duration::from_secs(600)).contains(&wait), "{wait:?}");
        let earlier = at(SystemTime::now() - Duration::from_secs(600));
        assert_eq!(read(429, &[date, &[("Retry-After", &earlier)]].concat()), None);
    }
}

#[test]
fn every_failed_answer_may_have_it() {
    let mut read = reader();
    for status in [301, 400, 401, 403, 404, 429, 500, 502, 503, 504] {
        assert_eq!(read(status, &[("Retry-After", "30")]), Some(Duration::from_secs(30)), "{status}");
        assert_eq!(read(status, &[]), None, "{status}");
    }
}
