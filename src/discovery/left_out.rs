//! Why a device is not among the targets: the reason for metrics, and the words for the log and the page.

use std::fmt::{self, Display, Formatter};

use crate::word_enum::words;

words! {
    /// Why a device is not among the targets.
    LeftOutReason {
    Broken = "broken",
    NoId = "no_id",
    BadUuid = "bad_uuid",
    /// Its tag is not the one that is asked for.
    NotTagged = "not_tagged",
    SwitchedOff = "switched_off",
    /// It is offline, and only devices that are online are asked for.
    Offline = "offline",
    NoPublicUrl = "no_public_url",
    NoLanAddress = "no_lan_address",
    LanAddressRefused = "lan_address_refused",
    /// Another device, which is online, reports its address, too.
    LanAddressTaken = "lan_address_taken",
    NoExporter = "no_exporter",
    }
}

impl LeftOutReason {
    pub fn text(self) -> &'static str {
        match self {
            LeftOutReason::Broken => "the API's record of it cannot be used",
            LeftOutReason::NoId => "the API's record of it has no id",
            LeftOutReason::BadUuid => "its uuid is not 32 or 62 hex digits",
            LeftOutReason::NotTagged => "its own tag has another value",
            LeftOutReason::SwitchedOff => "the tag prometheus.io/scrape switches it off",
            LeftOutReason::Offline => "balenaCloud sees it offline",
            LeftOutReason::NoPublicUrl => "its public device URL is switched off",
            LeftOutReason::NoLanAddress => "it reports no usable LAN address",
            LeftOutReason::LanAddressRefused => "none of its addresses may be scraped",
            LeftOutReason::LanAddressTaken => "another device has its address now: that one is online, and it is not",
            LeftOutReason::NoExporter => "no tag, no label of a service and no option names an exporter",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    pub reason: LeftOutReason,
    /// What is particular to this device; may be empty.
    pub detail: Box<str>,
}

impl From<LeftOutReason> for LeftOut {
    fn from(reason: LeftOutReason) -> Self {
        LeftOut { reason, detail: "".into() }
    }
}

impl Display for LeftOut {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match (self.reason, &*self.detail) {
            (LeftOutReason::NotTagged, tag) => {
                write!(f, "its own tag {tag} has another value than the one asked for")
            }
            (LeftOutReason::NoExporter, what) if !what.is_empty() => f.write_str(what),
            (reason, "") => f.write_str(reason.text()),
            (reason, detail) => write!(f, "{}: {detail}", reason.text()),
        }
    }
}
