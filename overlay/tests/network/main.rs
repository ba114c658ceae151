//! The network with real packets: hosts and containers as namespaces, real sockets in them.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod cluster;
mod encryption;
mod guard;
mod hosts;
mod lifecycle;
mod support;
mod traffic;
mod upgrade;

fn main() {
    support::main(
        &["ip", "nft"],
        |name| {
            let tcx =
                name.ends_with("by_tcx") && flynn_dataplane::Hook::detect() != flynn_dataplane::Hook::Tcx;
            if name.starts_with("encryption_") && !encryption::is_possible() {
                return Some("a kernel with WireGuard");
            }
            tcx.then_some("a kernel with tcx")
        },
        &[
            (
                "containers_reach_one_another",
                traffic::containers_reach_one_another,
            ),
            (
                "the_host_and_containers_reach_one_another",
                traffic::the_host_and_containers_reach_one_another,
            ),
            (
                "containers_reach_the_outside_by_the_host_s_address",
                traffic::containers_reach_the_outside,
            ),
            (
                "the_outside_does_not_reach_containers",
                traffic::the_outside_does_not_reach_containers,
            ),
            (
                "who_lies_about_its_address_is_dropped",
                traffic::who_lies_about_its_address_is_dropped,
            ),
            (
                "frames_that_the_overlay_does_not_carry_are_dropped",
                traffic::frames_that_are_not_carried,
            ),
            (
                "connections_outlive_the_daemon_and_its_successor",
                lifecycle::connections_outlive_the_daemon,
            ),
            (
                "no_datagram_is_lost_while_programs_are_replaced",
                lifecycle::no_datagram_is_lost,
            ),
            (
                "reconciling_removes_strays_and_mends_the_rest",
                lifecycle::reconciling_removes_strays_and_mends,
            ),
            (
                "attaching_again_replaces_what_was_there",
                lifecycle::attaching_again_replaces,
            ),
            (
                "a_failed_attachment_leaves_nothing",
                lifecycle::a_failed_attachment_leaves_nothing,
            ),
            (
                "a_container_that_is_gone_can_be_detached",
                lifecycle::a_container_that_is_gone_can_be_detached,
            ),
            (
                "many_containers_are_attached_at_once",
                lifecycle::many_containers_are_attached_at_once,
            ),
            (
                "all_containers_of_all_hosts_reach_one_another",
                hosts::all_reach_one_another,
            ),
            (
                "hosts_reach_containers_of_other_hosts_and_are_reached",
                hosts::hosts_reach_containers,
            ),
            (
                "a_packet_too_big_for_the_tunnel_is_cut_or_refused",
                hosts::too_big,
            ),
            ("what_can_be_done_by_hand_is", hosts::by_hand),
            (
                "streams_between_hosts_outlive_daemons",
                hosts::streams_outlive_daemons,
            ),
            ("changed_routes_are_followed", hosts::routes_change),
            ("forged_packets_are_dropped_and_counted", guard::forged_packets),
            ("direct_hosts_need_no_tunnel", guard::direct_hosts),
            ("policy_holds_between_hosts", guard::policy_between_hosts),
            ("ports_of_hosts_are_closed_to_jobs", guard::ports_between_hosts),
            ("limits_hold_between_hosts", guard::limits_between_hosts),
            (
                "an_upgrade_from_an_older_layout_loses_no_datagram_by_tcx",
                upgrade::from_layout_1,
            ),
            ("encryption_hides_what_goes_between_hosts", encryption::hides),
            ("encryption_outlives_daemons_and_keys", encryption::outlives),
            ("encryption_can_be_required", encryption::required),
            ("encryption_goes_away_with_a_key", encryption::goes_away),
            (
                "encryption_covers_what_is_balanced_to_other_hosts",
                encryption::balanced,
            ),
            ("the_mtu_is_the_uplink_s", traffic::the_mtu_is_the_uplink_s),
            (
                "strict_return_path_checks_are_no_obstacle",
                traffic::strict_return_path_checks,
            ),
            ("a_host_without_ipv6_has_a_network", traffic::a_host_without_ipv6),
            (
                "a_host_gets_another_subnet",
                lifecycle::a_host_gets_another_subnet,
            ),
            ("down_leaves_nothing", lifecycle::down_leaves_nothing),
        ],
    )
}
