//! Services' virtual addresses: which they are, and how an instance is found.

use core::mem;

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::bpf_get_prandom_u32,
    macros::map,
    maps::{Array, HashMap},
};
use flynn_abi::{Backend, BackendKey, DropReason, Ipv6, MAX_BACKENDS, MAX_SERVICES, ServiceConfig};

#[map(name = "service_config")]
static CONFIG: Array<ServiceConfig> = Array::pinned(1, 0);

/// How many instances each service has.
#[map(name = "service_counts")]
static COUNTS: Array<u32> = Array::pinned(MAX_SERVICES, 0);

// Not preallocated: a value that user space removes is then freed after a grace period and not reused under a program
// that still reads it.
#[map(name = "service_backends")]
static BACKENDS: HashMap<BackendKey, Backend> = HashMap::pinned(MAX_BACKENDS, BPF_F_NO_PREALLOC);

/// The four words of an address as the kernel has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Address(pub [u32; 4]);

/// What comes before an IPv4 address in its mapped form.
pub const MAPPED: u32 = 0xffff_u32.to_be();

impl Address {
    /// The IPv4 address, if it is one.
    #[inline(always)]
    pub fn v4(self) -> Option<u32> {
        let [a, b, c, d] = self.0;
        (a == 0 && b == 0 && c == MAPPED).then_some(d)
    }

    #[inline(always)]
    pub fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.0;
        a | b | c | d == 0
    }
}

impl From<Ipv6> for Address {
    #[inline(always)]
    fn from(address: Ipv6) -> Self {
        // SAFETY: any bytes are words. (Put together one by one, they would be moved so.)
        Self(unsafe { mem::transmute::<[u8; 16], [u32; 4]>(address.octets()) })
    }
}

impl From<Address> for Ipv6 {
    #[inline(always)]
    fn from(address: Address) -> Self {
        // SAFETY: as above.
        Self::new(unsafe { mem::transmute::<[u32; 4], [u8; 16]>(address.0) })
    }
}

/// What a virtual address stands for.
#[derive(Clone, Copy)]
pub struct Virtual {
    pub service: u32,
    pub leader: bool,
}

/// The service that an address belongs to, if it is virtual at all.
#[inline(always)]
pub fn find(address: Address) -> Option<Virtual> {
    let config = CONFIG.get(0)?;
    let offset = match address.v4() {
        Some(v4) => {
            let network = u32::from_be_bytes(config.network4.octets());
            let offset = u32::from_be(v4).wrapping_sub(network);
            if offset >= config.size4 {
                return None;
            }
            offset
        }
        None => {
            let network = Address::from(config.network6);
            if config.size4 == 0 || address.0[0] != network.0[0] || address.0[1] != network.0[1] {
                return None;
            }
            // Beyond the last service there is nobody, but the address is virtual all the same.
            if address.0[2] == 0 {
                u32::from_be(address.0[3])
            } else {
                0
            }
        }
    };
    Some(Virtual {
        service: offset >> 1,
        leader: offset & 1 != 0,
    })
}

#[inline(always)]
pub fn backend(place: BackendKey) -> Option<&'static Backend> {
    // SAFETY: the map is not preallocated, so the entry outlives this program run; user space replaces entries whole.
    unsafe { BACKENDS.get(place) }
}

/// Chooses an instance, at random where there are several.
#[inline(always)]
pub fn choose(wanted: Virtual) -> Result<(BackendKey, &'static Backend), DropReason> {
    if wanted.leader {
        let place = BackendKey {
            service: wanted.service,
            index: BackendKey::LEADER,
        };
        return backend(place)
            .map(|found| (place, found))
            .ok_or(DropReason::NoInstance);
    }
    // SAFETY: a helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    // Once more if the service has become smaller between the two looks.
    match pick(wanted.service, random) {
        None => pick(wanted.service, random).ok_or(DropReason::NoInstance),
        Some(found) => Ok(found),
    }
}

#[inline(always)]
fn pick(service: u32, random: u32) -> Option<(BackendKey, &'static Backend)> {
    let count = COUNTS.get_ptr(service)?;
    // SAFETY: the entry is there for ever, and whole: it is one word. Volatile, for a second look is meant as one.
    let count = unsafe { core::ptr::read_volatile(count) };
    if count == 0 {
        return None;
    }
    let place = BackendKey {
        service,
        index: random % count,
    };
    backend(place).map(|found| (place, found))
}

/// The instance, if it is where it was found.
#[inline(always)]
pub fn still_there(place: BackendKey, instance: u64) -> Option<(BackendKey, &'static Backend)> {
    let found = backend(place)?;
    (found.instance == instance).then_some((place, found))
}

/// Where the instance is for what goes to `address`: an IPv6 datagram does not become one of IPv4.
#[inline(always)]
pub fn reachable(address: Address, backend: &Backend) -> Result<Address, DropReason> {
    let target = Address::from(backend.address);
    match (address.v4(), target.v4()) {
        (Some(_), Some(_)) | (None, None) => Ok(target),
        (Some(_), None) => Err(DropReason::NoInstanceOfFamily),
        (None, Some(_)) => {
            let target = Address::from(backend.address6);
            if target.is_unspecified() {
                return Err(DropReason::NoInstanceOfFamily);
            }
            Ok(target)
        }
    }
}
